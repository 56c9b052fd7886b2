//! Feeds what libFuzzer makes up to the reader that `READER` names.
#![no_main]

use lonas_fuzz::{READERS, Seed};
use std::sync::OnceLock;

static SEED: OnceLock<Seed> = OnceLock::new();

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let seed = SEED.get_or_init(|| {
        let wanted = std::env::var("READER").unwrap_or_default();
        let names = READERS.map(|reader| reader.name).join(", ");
        let reader = READERS.into_iter().find(|reader| reader.name == wanted);
        Seed::new(reader.unwrap_or_else(|| panic!("READER must be one of {names}, not `{wanted}`")))
    });
    // A refusal is as good as a value; a panic, a hang or too much memory is what is looked for.
    let _ = seed.read(bytes);
});
