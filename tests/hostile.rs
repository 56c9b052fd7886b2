//! Arbitrary and mutated files: whatever bytes a file has, reading it ends in a value or in an error that names the
//! file. A panic, an endless loop or memory by a file's word would end the test.

use crate::allocations::most_during;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use readers::{READERS, Reader, Seed};

/// What each reader does with a file's bytes; fuzz/ feeds them with libFuzzer too.
#[path = "../fuzz/src/lib.rs"]
#[allow(unreachable_pub, reason = "there it is a crate")]
mod readers;

/// More than any whole seed is worth, and less than a number that a file made up.
const MOST_AT_ONCE: usize = 32 << 20;

/// One damage; positions are fractions of the length, in 1/65536.
#[derive(Debug, Clone)]
enum Mutation {
    Flip(u16, u8),
    /// A little-endian number of this many bytes: lengths, offsets and counts are such.
    Number(u16, usize, u64),
    Cut(u16, u16),
    Insert(u16, Vec<u8>),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let number = prop_oneof![
        Just(0),
        Just(u64::MAX),
        Just(1 << 63),
        Just(1 << 31),
        Just(u64::from(u32::MAX)),
        0..300u64,
        any::<u64>()
    ];
    prop_oneof![
        4 => (any::<u16>(), 0..8u8).prop_map(|(at, bit)| Mutation::Flip(at, bit)),
        4 => (any::<u16>(), prop_oneof![Just(1), Just(4), Just(8)], number)
            .prop_map(|(at, bytes, n)| Mutation::Number(at, bytes, n)),
        1 => (any::<u16>(), any::<u16>()).prop_map(|(from, to)| Mutation::Cut(from, to)),
        2 => (any::<u16>(), prop_oneof![
            prop::collection::vec(any::<u8>(), 1..20),
            // Pieces that stay readable, to get past the parser.
            prop::sample::select(vec!["0", "-1", "1e99", ",", "null", "[]", "\"x\":{},", "99999999999999999999"])
                .prop_map(|s| s.as_bytes().to_vec()),
        ]).prop_map(|(at, bytes)| Mutation::Insert(at, bytes)),
    ]
}

/// Only the first `header` bytes are damaged: what lies behind is numbers, where nothing can go wrong.
fn mutated(whole: &[u8], header: usize, mutations: &[Mutation]) -> Vec<u8> {
    let mut bytes = whole.to_vec();
    for mutation in mutations {
        let length = bytes.len().min(header);
        let place = |at: u16| length * usize::from(at) / 65536;
        match mutation {
            _ if length == 0 => break,
            Mutation::Flip(at, bit) => bytes[place(*at)] ^= 1 << bit,
            Mutation::Number(at, count, number) => {
                let at = place(*at);
                let end = (at + count).min(bytes.len());
                bytes[at..end].copy_from_slice(&number.to_le_bytes()[..end - at]);
            }
            Mutation::Cut(from, to) => {
                let (from, to) = (place(*from.min(to)), place(*from.max(to)));
                bytes.drain(from..to);
            }
            Mutation::Insert(at, piece) => {
                let at = place(*at);
                bytes.splice(at..at, piece.iter().copied());
            }
        }
    }
    bytes
}

/// Feeds a reader arbitrary bytes, then its file mutated: the same ones in every run. What is refused is refused briefly; the
/// undamaged file is read, and some of the damaged ones are not.
fn attack(reader: Reader) {
    let (seed, refusals) = (Seed::new(reader), std::cell::Cell::new(0));
    let whole = seed.whole();
    seed.read(&whole).unwrap();
    let check = |bytes: Vec<u8>| {
        let (read, most) = most_during(|| seed.read(&bytes));
        prop_assert!(most <= MOST_AT_ONCE, "{}: {most} bytes at once", reader.name);
        if let Err(message) = read {
            refusals.set(refusals.get() + 1);
            prop_assert!(message.len() < 2000, "{}: a message of {} bytes", reader.name, message.len());
        }
        Ok(())
    };
    let runner = |config| TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let config = Config { failure_persistence: None, ..Config::default() };
    let arbitrary = prop::collection::vec(any::<u8>(), 0..200);
    runner(Config { cases: 64, ..config.clone() }).run(&arbitrary, check).unwrap();
    // More with PROPTEST_CASES.
    let mutations = prop::collection::vec(mutation(), 1..4);
    runner(config).run(&mutations, |m| check(mutated(&whole, reader.header, &m))).unwrap();
    // All of the arbitrary ones, so more than those.
    assert!(refusals.get() > 64, "{}: the damage did not reach anything", reader.name);
}

#[test]
fn any_file_is_read_or_refused() {
    std::thread::scope(|scope| {
        for reader in READERS {
            let thread = std::thread::Builder::new().name(reader.name.into());
            thread.spawn_scoped(scope, move || attack(reader)).unwrap();
        }
    });
}
