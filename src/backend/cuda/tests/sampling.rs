//! Tokens chosen on the device.

use super::*;
use crate::backend::{Draw, Edit, SamplingError};

/// Draws of all kinds, with edits, one of which names a token that is not there.
fn draws(rows: u32, vocabulary: usize) -> Vec<(u32, Draw)> {
    let mut random = ChaCha8Rng::seed_from_u64(9);
    let mut draw = |row: u32| {
        let mut edit = |token| Edit { token, penalty: 1.5, add: random.random_range(-2.0..2.0) };
        let mut edits =
            if row.is_multiple_of(2) { Vec::new() } else { vec![edit(0), edit(vocabulary as u32)] };
        if row % 3 == 1 && vocabulary > 7 {
            edits.push(Edit { token: 7, penalty: 1.0, add: f32::NEG_INFINITY });
        }
        let draw = Draw {
            edits,
            temperature: [1.0, 0.0, 0.3, 2.0][row as usize % 4],
            top_k: [0, 5, 1, 0, 300][row as usize % 5],
            top_p: [1.0, 0.9, 0.3][row as usize % 3],
            min_p: [0.0, 0.0, 0.05][row as usize / 2 % 3],
            uniform: random.random(),
        };
        (row, draw)
    };
    (0..rows).map(&mut draw).collect()
}

#[test]
fn tokens_are_chosen_as_on_the_host() {
    for (rows, vocabulary) in [(1, 1), (60, 8), (60, 133), (60, 3000)] {
        let gpu = gpu();
        let table = gpu.table(host(rows.into(), rows as usize, vocabulary)).unwrap();
        let logits = |scale: f32| {
            let ids = (0..rows).collect::<Vec<_>>();
            let x = gpu.embed(&table, &ids).unwrap();
            (0..scale as usize).fold(x, |x, _| gpu.add(x, &gpu.embed(&table, &ids).unwrap()).unwrap())
        };
        let draws = draws(rows, vocabulary);
        for scale in [0.0, 9.0] {
            let values = gpu.host(logits(scale)).unwrap();
            let expected = draws.iter().zip(values.chunks_exact(vocabulary));
            let expected = expected.map(|((_, draw), row)| draw.choose(row)).collect::<Vec<_>>();
            let chosen = gpu.choose(&logits(scale), &draws).unwrap();
            assert_eq!(chosen, expected, "{rows} rows of {vocabulary}");
        }
    }
}

#[test]
fn the_least_temperature_and_share_that_there_are_leave_the_best_token() {
    let (gpu, vocabulary) = (gpu(), 1000);
    let table = gpu.table(host(7, 1, vocabulary)).unwrap();
    let logits = || gpu.embed(&table, &[0]).unwrap();
    let row = gpu.host(logits()).unwrap();
    for (temperature, top_p) in [
        (1e-38, 1.0),
        (1e-39, 1.0),
        (f32::from_bits(1), 1.0),
        (1.0, 1e-16),
        (1e-39, 1e-30),
        (2.0, f32::from_bits(1)),
    ] {
        for uniform in [0.0, 0.999] {
            let draw = Draw { edits: vec![], temperature, top_k: 0, top_p, min_p: 0.5, uniform };
            let chosen = gpu.choose(&logits(), &[(0, draw.clone())]).unwrap();
            assert_eq!(chosen, [draw.choose(&row)], "temperature {temperature}, top_p {top_p}");
        }
    }
}

#[test]
fn nothing_is_chosen_from_what_is_no_number_and_ties_go_to_the_first() {
    let gpu = gpu();
    let data = [vec![f32::NAN, f32::NEG_INFINITY, f32::INFINITY], vec![f32::NAN, -3.0, -3.0]].concat();
    let table =
        gpu.table(HostMatrix { name: "t".into(), rows: 2, columns: 3, data: HostData::F32(data) }).unwrap();
    let logits = gpu.embed(&table, &[0, 1]).unwrap();
    let greedy = Draw { edits: vec![], temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, uniform: 0.0 };
    let last = Draw { temperature: 1.0, top_k: 1, uniform: 0.999, ..greedy.clone() };
    let chosen = gpu.choose(&logits, &[(0, greedy.clone()), (1, greedy)]).unwrap();
    assert_eq!(chosen, [Err(SamplingError), Ok(1)]);
    assert_eq!(
        gpu.choose(&logits, &[(1, last)]).unwrap(),
        [Ok(2)],
        "equals of the last that top-k keeps stay"
    );
    assert!(gpu.choose(&logits, &draws(3, 3)).is_err());
}

#[test]
fn log_probabilities_are_those_of_the_host() {
    for (rows, vocabulary) in [(1, 1), (7, 8), (60, 133), (16, 3000)] {
        let gpu = gpu();
        let table = gpu.table(host(rows.into(), rows as usize, vocabulary)).unwrap();
        let logits = || {
            let x = gpu.embed(&table, &(0..rows).collect::<Vec<_>>()).unwrap();
            gpu.add(gpu.embed(&table, &(0..rows).rev().collect::<Vec<_>>()).unwrap(), &x).unwrap()
        };
        let mut random = ChaCha8Rng::seed_from_u64(3);
        // Some rows several times, others not at all; some tokens are beyond the vocabulary.
        let mut wanted = || (random.random_range(0..rows), random.random_range(0..vocabulary as u32 + 2));
        let tokens = (0..90).map(|_| wanted()).collect::<Vec<_>>();
        let expected =
            crate::backend::log_probabilities(&gpu.host(logits()).unwrap(), rows as usize, &tokens);
        let got = gpu.log_probabilities(logits(), rows as usize, &tokens).unwrap();
        for ((got, expected), wanted) in got.iter().zip(&expected).zip(&tokens) {
            let close = got == expected || (got - expected).abs() < 1e-5;
            assert!(close, "{wanted:?} of {rows} x {vocabulary}: {got}, not {expected}");
        }
        let beyond = gpu.log_probabilities(logits(), rows as usize, &[(rows, 0)]);
        assert!(beyond.unwrap_err().to_string().contains("log_probabilities"));
    }
}
