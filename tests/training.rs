//! Training against PyTorch + PEFT: ten optimizer steps, every gradient.

use crate::golden::{self, Supernet};
use lonas::backend::reference::{Compute, NamedTensor, Reference};
use lonas::train::{Recipe, Trainer};

#[derive(serde::Deserialize)]
struct Training {
    weight_decay: f64,
    accumulation: usize,
    micro_batch: usize,
    sequences: usize,
    epochs: usize,
    learning_rate: f64,
    micro_batches: Vec<MicroBatch>,
}

#[derive(serde::Deserialize)]
struct MicroBatch {
    sequences: Vec<Vec<u32>>,
    choices: Vec<usize>,
    loss: f32,
    learning_rate: f64,
    gradient_norm: Option<f64>,
}

fn trainer(net: &Supernet, recipe: Recipe, sequences: Vec<Vec<u32>>) -> Trainer {
    trainer_on(Compute::cpu(), net, recipe, sequences)
}

fn trainer_on(compute: Compute, net: &Supernet, recipe: Recipe, sequences: Vec<Vec<u32>>) -> Trainer {
    let backend = Reference::for_training(recipe.dropout, recipe.seed).on(compute);
    let model = net.load(&backend);
    Trainer::new(backend, model, net.shape.clone(), net.space.clone(), recipe, sequences).unwrap()
}

#[test]
fn ten_steps_are_those_of_pytorch_and_peft() {
    let net = Supernet::open("tiny-tied/base", "tiny-tied");
    // One thread, and more than a micro-batch has sequences; by our operations and by those for other devices.
    let (ours, composed) = (Compute::cpu(), Compute::composed(false));
    for (name, threads, compute) in [
        ("plain", 1, &ours),
        ("decay", 1, &ours),
        ("plain", 2, &ours),
        ("plain", 5, &ours),
        ("decay", 1, &composed),
    ] {
        let golden: Training = golden::json(&format!("training/{name}.json"));
        let recipe = Recipe {
            epochs: golden.epochs,
            micro_batch: golden.micro_batch,
            accumulation: golden.accumulation,
            learning_rate: golden.learning_rate,
            weight_decay: golden.weight_decay,
            dropout: 0.0,
            threads,
            ..Recipe::default()
        };
        // The data's length decides the schedule; the micro-batches themselves are the golden ones.
        let mut trainer = trainer_on(compute.clone(), &net, recipe, vec![vec![3, 4]; golden.sequences]);
        trainer.checkpoint_gradients(compute.is_composed());
        assert_eq!(trainer.total(), golden.micro_batches.len() as u64);
        for (i, expected) in golden.micro_batches.iter().enumerate() {
            let sub_network = net.space.sub_network(expected.choices.clone()).unwrap();
            let done = trainer.step_on(&expected.sequences, sub_network).unwrap();
            let off = (done.loss - expected.loss).abs();
            assert!(off < 2e-4, "{name} micro-batch {i}: loss {} not {}", done.loss, expected.loss);
            assert!((done.learning_rate - expected.learning_rate).abs() < 1e-12);
            assert_eq!(done.gradient_norm.is_some(), expected.gradient_norm.is_some());
            if let (Some(norm), Some(expected)) = (done.gradient_norm, expected.gradient_norm) {
                assert!(
                    (norm / expected - 1.0).abs() < 1e-3,
                    "{name} micro-batch {i}: norm {norm} not {expected}"
                );
            }
        }
        let last = golden::tensors(&format!("training/{name}.safetensors"));
        let values = trainer.optimizer().values();
        assert_eq!(values.len(), last.len());
        for tensor in values {
            // Adam's first steps move every number by about the rate, so a wrong sign would be off by 6e-3.
            let off = golden::distance(&tensor.values, &last[&tensor.name]);
            assert!(off < 1e-3, "{name}: {} is off by {off}", tensor.name);
        }
    }
}

#[test]
fn every_adapter_tensor_has_pytorchs_gradient() {
    let net = Supernet::open("tiny-tied/base", "tiny-tied");
    let golden: Training = golden::json("training/plain.json");
    let first = &golden.micro_batches[0];
    let expected = golden::tensors("training/gradients.safetensors");
    // A window of two leaves the first micro-batch's gradient, halved, in the accumulator.
    let recipe = Recipe { dropout: 0.0, accumulation: 2, ..Recipe::default() };
    let mut trainer = trainer(&net, recipe, vec![vec![3, 4]; 9]);
    let sub_network = net.space.sub_network(first.choices.clone()).unwrap();
    trainer.step_on(&first.sequences, sub_network).unwrap();
    let gradients = trainer.optimizer().gradients();
    assert_eq!(gradients.len(), expected.len());
    for gradient in gradients {
        let doubled = gradient.values.iter().map(|g| 2.0 * g).collect::<Vec<_>>();
        let expected = &expected[&gradient.name];
        let largest = expected.iter().fold(0f32, |m, g| m.max(g.abs()));
        assert!(largest > 0.0, "{} has no gradient, so nothing would be checked", gradient.name);
        let off = golden::distance(&doubled, expected);
        assert!(off <= 1e-3 * largest, "{}: off by {off} of {largest}", gradient.name);
    }
}

#[test]
fn a_gradient_through_bf16_weights_is_that_of_f32_but_for_rounding() {
    // A base whose weights are bf16 already: what differs is that every product rounds its input and its result.
    let net = Supernet::open("tiny-untied-bf16/base", "tiny-untied-bf16");
    let sequences = [11, 2, 7].map(|n| (0..n).map(|i| 3 + i * 17 % 80).collect::<Vec<u32>>());
    let sub_network = net.space.pick(|group, choices| (group + 1) % choices);
    let run = |compute: Compute| {
        let recipe = Recipe { dropout: 0.2, accumulation: 2, ..Recipe::default() };
        let mut trainer = trainer_on(compute, &net, recipe, vec![vec![3, 4]; 9]);
        let loss = trainer.step_on(&sequences, sub_network.clone()).unwrap().loss;
        (loss, trainer.optimizer().gradients())
    };
    let ((exact, of_exact), (rounded, of_rounded)) = (run(Compute::cpu()), run(Compute::composed(true)));
    assert_ne!(exact, rounded);
    // Half a unit in the last of 8 bits is 2e-3. A loss goes through some 20 products in a row whose errors have
    // random signs, sqrt(20) of them, and is a mean over rows of a logarithm of exponentials of logits of a few units.
    assert!((exact - rounded).abs() < 0.02, "loss {rounded} not {exact}");
    for (exact, rounded) in of_exact.iter().zip(&of_rounded) {
        let dot = |a: &NamedTensor, b: &NamedTensor| {
            a.values.iter().zip(&b.values).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
        };
        let (length, off) = (dot(exact, exact).sqrt(), dot(rounded, rounded).sqrt());
        assert!(length > 0.0, "{} has no gradient, so nothing would be checked", exact.name);
        let cosine = dot(exact, rounded) / (length * off);
        // Twice as many products, there and back: sqrt(40) times 2e-3 is a hundredth of the length, and a tenth would
        // still leave the cosine above 0.995.
        assert!(cosine > 0.995 && (off / length - 1.0).abs() < 0.1, "{}: {cosine}, {off}", exact.name);
    }
}
