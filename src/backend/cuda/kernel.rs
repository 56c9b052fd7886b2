//! The kernels of `kernels/*.cu`, and how they are started.

/// Names each kernel once: in Rust, and as its source does.
macro_rules! kernels {
    ($($kernel:ident = $name:literal,)*) => {
        /// A kernel of `kernels/*.cu`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub(super) enum Kernel { $($kernel,)* }

        impl Kernel {
            /// By number.
            pub(super) const NAMES: &[&str] = &[$($name,)*];
            pub(super) const ALL: &[Kernel] = &[$(Self::$kernel,)*];
        }
    };
}

kernels! {
    Embed = "embed",
    SelectRows = "select_rows",
    RmsNorm = "rms_norm",
    LayerNorm = "layer_norm",
    HeadNorm = "head_norm",
    ToBf16 = "to_bf16",
    ToF32 = "to_f32",
    CopyF32 = "copy_f32",
    AddRows = "add_rows",
    SiluMultiply = "silu_multiply",
    Activate = "activate",
    Rotary = "rotary",
    UnpackWeight = "unpack_weight",
    LinearFew8Bf16 = "linear_few_8",
    LinearFew16Bf16 = "linear_few_16",
    LinearFew32Bf16 = "linear_few_32",
    GateUpFew8Bf16 = "gate_up_few_8",
    GateUpFew16Bf16 = "gate_up_few_16",
    GateUpFew32Bf16 = "gate_up_few_32",
    NormedLinearFewBf16 = "normed_linear_few",
    NormedGateUpFewBf16 = "normed_gate_up_few",
    LinearFew8Int8 = "linear_few_8_int8",
    LinearFew16Int8 = "linear_few_16_int8",
    LinearFew32Int8 = "linear_few_32_int8",
    GateUpFew8Int8 = "gate_up_few_8_int8",
    GateUpFew16Int8 = "gate_up_few_16_int8",
    GateUpFew32Int8 = "gate_up_few_32_int8",
    NormedLinearFewInt8 = "normed_linear_few_int8",
    NormedGateUpFewInt8 = "normed_gate_up_few_int8",
    LinearFew8Int4 = "linear_few_8_int4",
    LinearFew16Int4 = "linear_few_16_int4",
    LinearFew32Int4 = "linear_few_32_int4",
    GateUpFew8Int4 = "gate_up_few_8_int4",
    GateUpFew16Int4 = "gate_up_few_16_int4",
    GateUpFew32Int4 = "gate_up_few_32_int4",
    NormedLinearFewInt4 = "normed_linear_few_int4",
    NormedGateUpFewInt4 = "normed_gate_up_few_int4",
    NarrowLinearFew = "narrow_linear_few",
    NarrowGateUpFew = "narrow_gate_up_few",
    NarrowNormedLinearFew = "narrow_normed_linear_few",
    NarrowNormedGateUpFew = "narrow_normed_gate_up_few",
    ShrinkMany16 = "shrink_many_16",
    ShrinkMany32 = "shrink_many_32",
    ExpandMany32 = "expand_many_32",
    ExpandMany64 = "expand_many_64",
    ExpandMany128 = "expand_many_128",
    ExpandManyWide = "expand_many_wide",
    GateUpMany64 = "gate_up_many_64",
    GateUpMany128 = "gate_up_many_128",
    GateUpManyWide = "gate_up_many_wide",
    ExpandManyWgmma256 = "expand_many_wgmma_256",
    ExpandManyWgmma64 = "expand_many_wgmma_64",
    GateUpManyWgmma256 = "gate_up_many_wgmma_256",
    GateUpManyWgmma64 = "gate_up_many_wgmma_64",
    StoreF32 = "store_f32",
    StoreBf16 = "store_bf16",
    AttendF32To64 = "attend_f32_64",
    AttendF32To128 = "attend_f32_128",
    AttendF32To256 = "attend_f32_256",
    AttendF32Odd = "attend_f32_odd",
    AttendBf16To64 = "attend_bf16_64",
    AttendBf16To128 = "attend_bf16_128",
    AttendBf16To256 = "attend_bf16_256",
    AttendBf16To64Grouped = "attend_bf16_64_grouped",
    AttendBf16To128Grouped = "attend_bf16_128_grouped",
    AttendBf16To256Grouped = "attend_bf16_256_grouped",
    AttendBf16Odd = "attend_bf16_odd",
    AttendMany64 = "attend_many_64",
    AttendMany128 = "attend_many_128",
    AttendMany256 = "attend_many_256",
    Sample = "sample",
    LogProbabilities = "log_probabilities",
    ReadAll = "read_all",
    MultiplyAdd = "multiply_add",
    MultiplyAddTensors = "multiply_add_tensors",
}

impl Kernel {
    /// Bytes of shared memory that a launch gives, as the sources say.
    pub(super) fn shared_bytes(self) -> usize {
        match self {
            Self::AttendBf16To64 | Self::AttendBf16To64Grouped => 32 << 10,
            kernel if kernel.attends_few() => 64 << 10,
            Self::AttendMany64 => 40 << 10,
            Self::ExpandMany32 => 48 << 10,
            Self::ShrinkMany16 | Self::ExpandMany64 | Self::ExpandMany128 => 64 << 10,
            Self::GateUpMany64 | Self::GateUpMany128 => 64 << 10,
            Self::AttendMany128 => 80 << 10,
            Self::AttendMany256 => 160 << 10,
            Self::ShrinkMany32 | Self::ExpandManyWide | Self::GateUpManyWide => 96 << 10,
            kernel if kernel.multiplies_narrow() => 168 << 10,
            kernel if kernel.multiplies_few() => match kernel.rows_of_few() {
                8 => 72 << 10,
                16 => 72 << 10,
                _ => 96 << 10,
            },
            Self::ExpandManyWgmma64 | Self::GateUpManyWgmma64 => 97 << 10,
            Self::ExpandManyWgmma256 | Self::GateUpManyWgmma256 => 193 << 10,
            _ => 0,
        }
    }

    /// Bytes that it has beside those, at most.
    pub(super) fn static_bytes(self) -> usize {
        match self {
            kernel if kernel.attends_few() => 24 << 10,
            kernel if kernel.multiplies_few() => match kernel.rows_of_few() {
                8 => 12 << 10,
                16 => 20 << 10,
                _ => 31 << 10,
            },
            kernel if kernel.multiplies_narrow() => 12 << 10,
            // More would leave heads of 256 no room on an A100.
            Self::AttendMany64 | Self::AttendMany128 | Self::AttendMany256 => 1 << 10,
            _ => 8 << 10,
        }
    }

    /// Whether it is one of kernels/few_rows.cu.
    pub(super) fn multiplies_few(self) -> bool {
        (Self::LinearFew8Bf16 as u8..=Self::NormedGateUpFewInt4 as u8).contains(&(self as u8))
    }

    /// Whether it is one of kernels/few_narrow.cu.
    pub(super) fn multiplies_narrow(self) -> bool {
        (Self::NarrowLinearFew as u8..=Self::NarrowNormedGateUpFew as u8).contains(&(self as u8))
    }

    /// Rows of a block of one of kernels/few_rows.cu.
    fn rows_of_few(self) -> usize {
        match Self::NAMES[self as usize] {
            name if name.contains("_32") => 32,
            name if name.contains("_16") => 16,
            _ => 8,
        }
    }

    /// Whether it is one of `attend` in kernels/attend_few.cu.
    pub(super) fn attends_few(self) -> bool {
        (Self::AttendF32To64 as u8..=Self::AttendBf16Odd as u8).contains(&(self as u8))
    }
}

/// How many blocks, threads of each, and bytes of shared memory that the launch gives.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    pub(super) blocks: [usize; 3],
    pub(super) threads: usize,
    pub(super) shared: usize,
}

impl Grid {
    pub(super) fn new(blocks: [usize; 3], threads: usize) -> Self {
        Self { blocks, threads, shared: 0 }
    }

    /// A thread for each of `count` numbers.
    pub(super) fn each(count: usize) -> Self {
        Self::new([count.div_ceil(256), 1, 1], 256)
    }

    /// A block for each of `rows` rows of `width` numbers.
    pub(super) fn by_row(rows: usize, width: usize) -> Self {
        Self::new([rows, 1, 1], width.next_multiple_of(32).clamp(32, 256))
    }
}

/// A kernel's argument: a number, an address, or a struct of either.
#[derive(Debug, Clone, Copy)]
pub(super) enum Argument<'a> {
    Int(i32),
    Float(f32),
    Size(usize),
    Address(u64),
    /// A struct as it lies in memory, a multiple of eight bytes.
    Struct(&'a [u64]),
}

/// A count or a size as kernels take it.
pub(super) fn int(n: usize) -> Argument<'static> {
    Argument::Int(n as i32)
}

/// Two ints that stand side by side in a struct.
pub(super) fn pair(first: usize, second: usize) -> u64 {
    u64::from(first as u32) | u64::from(second as u32) << 32
}

/// Kernels in the order in which they start, with all that they are given: numbers in one row, so that two tapes are
/// compared at once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Tape {
    words: Vec<u64>,
    launches: usize,
}

/// One launch of a [`Tape`].
pub(super) struct Launch<'a> {
    pub(super) kernel: usize,
    pub(super) grid: Grid,
    /// Where each argument lies.
    pub(super) arguments: Vec<&'a u64>,
}

/// Words before a launch's arguments.
const HEAD: usize = 4;

impl Tape {
    /// An empty one with as much room as another one takes.
    pub(super) fn as_long_as(other: &Self) -> Self {
        Self { words: Vec::with_capacity(other.words.len()), launches: 0 }
    }

    pub(super) fn push(&mut self, kernel: Kernel, grid: Grid, arguments: &[Argument<'_>]) {
        let Grid { blocks: [x, y, z], threads, shared } = grid;
        let head = [kernel as u64, pair(x, y), pair(z, threads), pair(shared, arguments.len())];
        self.words.extend(head);
        for argument in arguments {
            match argument {
                Argument::Int(value) => self.words.extend([1, u64::from(*value as u32)]),
                Argument::Float(value) => self.words.extend([1, u64::from(value.to_bits())]),
                Argument::Size(value) => self.words.extend([1, *value as u64]),
                Argument::Address(value) => self.words.extend([1, *value]),
                Argument::Struct(words) => {
                    self.words.push(words.len() as u64);
                    self.words.extend_from_slice(words);
                }
            }
        }
        self.launches += 1;
    }

    pub(super) fn launches(&self) -> usize {
        self.launches
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Launch<'_>> {
        let (mut rest, halves) = (&self.words[..], |word: u64| (word as u32 as usize, (word >> 32) as usize));
        std::iter::from_fn(move || {
            let (head, mut after) = rest.split_at_checked(HEAD)?;
            let ((x, y), (z, threads), (shared, count)) = (halves(head[1]), halves(head[2]), halves(head[3]));
            let mut arguments = Vec::with_capacity(count);
            for _ in 0..count {
                let (length, words) = after.split_first()?;
                arguments.push(words.first()?);
                after = words.get(*length as usize..)?;
            }
            rest = after;
            let grid = Grid { blocks: [x, y, z], threads, shared };
            Some(Launch { kernel: head[0] as usize, grid, arguments })
        })
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn a_tape_gives_back_what_it_was_given() {
        let mut tape = Tape::default();
        let grid = Grid { blocks: [3, 2, 1], threads: 64, shared: 128 };
        tape.push(Kernel::Rotary, grid, &[int(7), Argument::Struct(&[1, 2, 3]), Argument::Address(1 << 40)]);
        tape.push(Kernel::Embed, Grid::each(1000), &[]);
        let launches = tape.iter().collect::<Vec<_>>();
        let numbers = |launch: &Launch<'_>| launch.arguments.iter().map(|&&word| word).collect::<Vec<_>>();
        assert_eq!((launches.len(), tape.launches()), (2, 2));
        assert_eq!(numbers(&launches[0]), [7, 1, 1 << 40]);
        assert_eq!(
            (launches[0].grid.blocks, launches[0].grid.threads, launches[0].grid.shared),
            ([3, 2, 1], 64, 128)
        );
        assert_eq!(Kernel::NAMES[launches[1].kernel], "embed");
        assert_eq!((launches[1].grid.blocks, launches[1].arguments.len()), ([4, 1, 1], 0));
    }
}
