// Tensor cores and asynchronous copies. A warp's mma or ldmatrix is computed once, when its last lane has arrived: the
// scheduler calls run_on_warp. A cp.async is done as late as a GPU may do it, at the wait for its group, and until then
// its destination counts as nobody's to touch; so a missing or too weak wait shows, whatever the order of threads.

#include <string.h>

#include <string>
#include <vector>

#include "driver.h"

namespace emulator {
namespace {

constexpr int kChunk = 16;  // bytes of a copy and of a matrix's row
constexpr int kMaxThreads = 1024;

// A lane's part of a collective; it lives on the lane's stack until the collective has returned.
struct Multiply {
    float* sums;
    const unsigned* a;
    unsigned b[2];
};
struct Load {
    unsigned* to;
    const void* row;
    int matrices;
    bool transposed;
    const void* code;
};

struct Copy {
    unsigned char* shared;
    const unsigned char* from;
    int bytes, size;
    const void* code;
};
struct Copies {
    std::vector<Copy> open;                 // not committed yet
    std::vector<std::vector<Copy>> groups;  // committed and not waited for, oldest first
};
Copies copies[kMaxThreads];

// A thread's part of a product of tiles: columns / 2 sums.
struct TileProduct {
    float* sums;
    int columns;
    uint64_t a, b;  // addresses of the first row's first number
    const void* code;
};
struct TileProducts {
    std::vector<TileProduct> open;
    std::vector<std::vector<TileProduct>> groups;
};
TileProducts tile_products[kMaxThreads];

float low(unsigned pair) { return emulator_bits<float>(pair << 16); }
float high(unsigned pair) { return emulator_bits<float>(pair & 0xffff0000u); }

// The fragments' layout is that of the PTX manual, "Matrix Fragments for mma.m16n8k16". Products are added up in double
// precision and rounded once: a GPU's own sum is a little less exact, and in an order that it does not tell.
void multiply(const uint64_t* values) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < kWarpSize; ++lane) {
        const auto& part = *reinterpret_cast<const Multiply*>(values[lane]);
        const int group = lane / 4, pair = lane % 4 * 2;
        for (int i = 0; i < 4; ++i) {
            float* to = &a[group + i % 2 * 8][pair + i / 2 * 8];
            to[0] = low(part.a[i]), to[1] = high(part.a[i]);
        }
        for (int i = 0; i < 2; ++i)
            b[pair + i * 8][group] = low(part.b[i]), b[pair + i * 8 + 1][group] = high(part.b[i]);
    }
    for (int row = 0; row < 16; ++row) {
        double sums[8] = {};
        for (int k = 0; k < 16; ++k)
            for (int column = 0; column < 8; ++column) sums[column] += static_cast<double>(a[row][k]) * b[k][column];
        for (int column = 0; column < 8; ++column) {
            const int lane = row % 8 * 4 + column / 2;
            float& sum = reinterpret_cast<const Multiply*>(values[lane])->sums[row / 8 * 2 + column % 2];
            sum = static_cast<float>(sum + sums[column]);
        }
    }
}

void load(Fiber* lanes, const uint64_t* values) {
    const auto part = [&](int lane) -> const Load& { return *reinterpret_cast<const Load*>(values[lane]); };
    const int matrices = part(0).matrices;
    const bool transposed = part(0).transposed;
    uint16_t rows[4][8][8];
    for (int lane = 0; lane < matrices * 8; ++lane) {
        const Load& given = part(lane);
        current = &lanes[lane];
        const auto address = reinterpret_cast<uint64_t>(given.row);
        if (!in_shared(given.row, kChunk))
            fail("ldmatrix" + source_line(given.code) + " reads what is not the block's shared memory: " +
                 describe_address(address));
        if (address % kChunk)
            fail("a misaligned ldmatrix" + source_line(given.code) + ": a row begins at a multiple of 16 bytes");
        note_shared(given.row, kChunk, false, given.code);
        memcpy(rows[lane / 8][lane % 8], given.row, kChunk);
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
        const int row = lane / 4, pair = lane % 4 * 2;
        for (int matrix = 0; matrix < matrices; ++matrix) {
            const auto& from = rows[matrix];
            const unsigned first = transposed ? from[pair][row] : from[row][pair];
            const unsigned second = transposed ? from[pair + 1][row] : from[row][pair + 1];
            part(lane).to[matrix] = first | second << 16;
        }
    }
}

template <int MATRICES>
void collect(unsigned (&to)[MATRICES], const void* row, bool transposed, Place place, const void* code) {
    const Load given{to, row, MATRICES, transposed, code};
    const Call call = transposed ? (MATRICES == 4 ? Call::LoadMatrix4Trans : Call::LoadMatrix2Trans)
                                 : (MATRICES == 4 ? Call::LoadMatrix4 : Call::LoadMatrix2);
    collective(call, kFullMask, reinterpret_cast<uint64_t>(&given), place);
}

void finish(const Copy& copy) {
    mark_copying(copy.shared, copy.size, nullptr);
    note_shared(copy.shared, copy.size, true, copy.code);
    memcpy(copy.shared, copy.from, copy.bytes);
    memset(copy.shared + copy.bytes, 0, copy.size - copy.bytes);
}

// The sixteen numbers of a tile's row. A tile has rows of 128 bytes; bits 4 to 6 of an address are those of the number's place
// in the row, turned over where bits 7 to 9 are set (PTX manual, "Swizzling Modes", 128 bytes).
void tile_row(uint64_t tile, int row, const void* code, float (&to)[16]) {
    for (int chunk = 0; chunk < 2; ++chunk) {
        uint64_t address = tile + row * 128 + chunk * kChunk;
        address ^= (address >> 7 & 7) << 4;
        const auto* from = reinterpret_cast<const unsigned char*>(address);
        if (!in_shared(from, kChunk))
            fail("wgmma" + source_line(code) + " reads what is not the block's shared memory: " + describe_address(address));
        note_shared(from, kChunk, false, code);
        uint16_t numbers[8];
        memcpy(numbers, from, kChunk);
        for (int i = 0; i < 8; ++i) to[chunk * 8 + i] = low(numbers[i]);
    }
}
// What the PTX manual calls wgmma's matrix fragment D: that of mma.m16n8k16 for each warp and eight columns.
void finish(const TileProduct& product) {
    const int thread = current->index % (4 * kWarpSize), lane = thread % kWarpSize;
    float a[2][16], b[16];
    for (int half = 0; half < 2; ++half)
        tile_row(product.a, thread / kWarpSize * 16 + lane / 4 + 8 * half, product.code, a[half]);
    for (int i = 0; i < product.columns / 4; ++i) {
        tile_row(product.b, i / 2 * 8 + lane % 4 * 2 + i % 2, product.code, b);
        for (int half = 0; half < 2; ++half) {
            double sum = 0;
            for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[half][k]) * b[k];
            float& to = product.sums[i / 2 * 4 + half * 2 + i % 2];
            to = static_cast<float>(to + sum);
        }
    }
}

}  // namespace

void run_on_warp(Call call, Fiber* lanes, const uint64_t* values) {
    Fiber* const running = current;
    if (call == Call::Multiply)
        multiply(values);
    else
        load(lanes, values);
    current = running;
}

void forget_copies(int threads) {
    for (int thread = 0; thread < threads; ++thread) {
        Copies& own = copies[thread];
        own.groups.push_back(std::move(own.open));
        for (const auto& group : own.groups)
            for (const Copy& copy : group) mark_copying(copy.shared, copy.size, nullptr);
        own.open.clear();
        own.groups.clear();
        tile_products[thread] = {};
    }
}

}  // namespace emulator

using namespace emulator;

void mma_m16n8k16(float (&sums)[4], const unsigned (&a)[4], unsigned b_low, unsigned b_high, const char* file, int line) {
    const Multiply given{sums, a, {b_low, b_high}};
    collective(Call::Multiply, kFullMask, reinterpret_cast<uint64_t>(&given), LONAS_PLACE);
}
void ldmatrix_x4(unsigned (&to)[4], const void* row, const char* file, int line) {
    collect(to, row, false, LONAS_PLACE, __builtin_return_address(0));
}
void ldmatrix_x2(unsigned (&to)[2], const void* row, const char* file, int line) {
    collect(to, row, false, LONAS_PLACE, __builtin_return_address(0));
}
void ldmatrix_x4_trans(unsigned (&to)[4], const void* row, const char* file, int line) {
    collect(to, row, true, LONAS_PLACE, __builtin_return_address(0));
}
void ldmatrix_x2_trans(unsigned (&to)[2], const void* row, const char* file, int line) {
    collect(to, row, true, LONAS_PLACE, __builtin_return_address(0));
}

// What is wrong is told here, where the copy is issued, and not at the wait, of which one stands for many copies.
static void cp_async(void* shared, const void* from, int bytes, int size, const void* code) {
    const auto source = reinterpret_cast<uint64_t>(from), target = reinterpret_cast<uint64_t>(shared);
    if (bytes < 0 || bytes > size)
        fail("a cp.async" + source_line(code) + " of " + std::to_string(bytes) + " of " + std::to_string(size) + " bytes");
    if (!in_shared(shared, size))
        fail("a cp.async" + source_line(code) + " to what is not the block's shared memory: " + describe_address(target));
    if (source % size || target % size)
        fail("a misaligned cp.async" + source_line(code) + ": both addresses are multiples of " + std::to_string(size));
    if (bytes > 0 && !is_device_range(source, bytes))
        fail("an illegal cp.async" + source_line(code) + " of " + std::to_string(bytes) + " bytes, " +
             describe_address(source));
    // The write may happen from now on, so whoever uses the place must have been ordered before.
    note_shared(shared, size, true, code);
    mark_copying(shared, size, code);
    copies[current->index].open.push_back(
        {static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(from), bytes, size, code});
}
void cp_async_16(void* shared, const void* from, int bytes) { cp_async(shared, from, bytes, kChunk, __builtin_return_address(0)); }
void cp_async_4(void* shared, const void* from, int bytes) { cp_async(shared, from, bytes, 4, __builtin_return_address(0)); }
void cp_async_commit() {
    Copies& own = copies[current->index];
    own.groups.push_back(std::move(own.open));
    own.open.clear();
}
void cp_async_wait(int groups_left) {
    auto& groups = copies[current->index].groups;
    while (groups.size() > static_cast<size_t>(groups_left)) {
        for (const Copy& copy : groups.front()) finish(copy);
        groups.erase(groups.begin());
    }
}

unsigned long long tile_descriptor(const void* tile) {
    const auto address = reinterpret_cast<uint64_t>(tile);
    if (address % 1024) fail("a tile for wgmma" + source_line(__builtin_return_address(0)) + " begins at a multiple of 1024 bytes");
    return address / kChunk;
}
void wgmma(float* sums, int columns, unsigned long long a, unsigned long long b) {
    tile_products[current->index].open.push_back({sums, columns, a * kChunk, b * kChunk, __builtin_return_address(0)});
}
void wgmma_commit() {
    TileProducts& own = tile_products[current->index];
    own.groups.push_back(std::move(own.open));
    own.open.clear();
}
void wgmma_wait(int groups_left) {
    auto& groups = tile_products[current->index].groups;
    while (groups.size() > static_cast<size_t>(groups_left)) {
        for (const TileProduct& product : groups.front()) finish(product);
        groups.erase(groups.begin());
    }
}
