//! Gradients of the reference backend against finite differences, tensor by tensor: candle has operations that drop a
//! gradient without an error, and residuals hide that from the loss.

use crate::golden::Supernet;
use lonas::backend::reference::Reference;
use lonas::model::SuperAdapter;
use lonas::model::llama;
use lonas::supernet::{Part, SubNetwork};
use lonas::train::{Recipe, Sequence, Trainer};
use lonas::weights::{HostData, HostMatrix};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn trainer(net: &Supernet, adapter: SuperAdapter) -> Trainer {
    // A window of two leaves the first micro-batch's gradient, halved, where it can be seen.
    let recipe = Recipe { dropout: 0.0, accumulation: 2, ..Recipe::default() };
    let backend = Reference::for_training(recipe.dropout, recipe.seed);
    let model = llama::load(&backend, &net.base, vec![adapter], &net.orders).unwrap();
    Trainer::new(
        backend,
        model,
        net.shape.clone(),
        net.space.clone(),
        recipe,
        vec![Sequence::whole(vec![3, 4]); 9],
    )
    .unwrap()
}

/// `model.layers.0.mlp.up_proj.lora_A.weight` of an adapter.
fn tensor<'a>(adapter: &'a mut SuperAdapter, name: &str) -> &'a mut HostMatrix {
    let (module, half) = name.trim_end_matches(".weight").rsplit_once('.').unwrap();
    let (a, b) = adapter.tensors.get_mut(module).unwrap();
    if half == "lora_A" { a } else { b }
}

/// The loss with element `(row, column)` of tensor `name` moved by `step`.
fn loss_moved(
    net: &Supernet,
    sequences: &[Sequence],
    sub_network: &SubNetwork,
    name: &str,
    element: usize,
    step: f32,
) -> f64 {
    let mut adapter = net.super_adapter();
    let HostData::F32(values) = &mut tensor(&mut adapter, name).data else { panic!("{name} is not f32") };
    values[element] += step;
    f64::from(trainer(net, adapter).loss_of(sequences, sub_network).unwrap())
}

#[test]
fn every_adapter_tensors_gradient_is_the_finite_difference() {
    // The loss is about 5 and rounded to about 5e-7, more after a forward of sums; the difference over 2 STEP has that
    // over 2e-2, below 1e-4; the third derivative times STEP^2 / 6 adds a few thousandths of the gradient.
    const STEP: f32 = 1e-2;
    let mut random = ChaCha8Rng::seed_from_u64(3);
    for name in ["tiny-tied", "tiny-bias-headdim", "tiny-depth", "tiny-depth-bias"] {
        let net = Supernet::open(&format!("{name}/base"), name);
        let vocabulary = net.base.config.vocabulary as u32;
        let mut sequence = |n| (0..n).map(|_| random.random_range(3..vocabulary)).collect::<Vec<_>>();
        let sequences = [sequence(13), sequence(2), sequence(7)].map(Sequence::whole);
        // A different choice in neighbouring groups, minimal ones among them.
        let sub_network = net.space.pick(|group, choices| (group + 1) % choices);
        let active = net.space.resolve(&net.shape, &sub_network);

        let mut trainer = trainer(&net, net.super_adapter());
        trainer.step_on(&sequences, sub_network.clone()).unwrap();
        let gradients = trainer.optimizer().gradients();
        assert_eq!(gradients.len(), 2 * net.folder.adapter().unwrap().len());
        for gradient in &gradients {
            let tensor = net.shape.parse_tensor(&gradient.name).unwrap();
            let linear = active.linears[tensor.linear];
            let (rows, columns) = match tensor.part {
                Part::LoraA => (linear.rank, linear.inp),
                _ => (linear.out, linear.rank),
            };
            let inside = |i: usize| i / gradient.columns < rows && i % gradient.columns < columns;
            let (in_prefix, outside): (Vec<_>, Vec<_>) = (0..gradient.values.len()).partition(|&i| inside(i));
            assert!(outside.iter().all(|&i| gradient.values[i] == 0.0), "{}", gradient.name);
            if linear.is_nothing() {
                continue;
            }

            let size = |i: &usize| gradient.values[*i].abs();
            let steepest = in_prefix.iter().copied().max_by(|a, b| size(a).total_cmp(&size(b))).unwrap();
            let largest = 2.0 * f64::from(size(&steepest));
            assert!(largest > 0.02, "{}: {largest} is too flat to be measured", gradient.name);
            let mut any = || in_prefix[random.random_range(0..in_prefix.len())];
            for element in [steepest, any(), any()] {
                let moved = |step| loss_moved(&net, &sequences, &sub_network, &gradient.name, element, step);
                let difference = (moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP);
                let computed = 2.0 * f64::from(gradient.values[element]);
                let off = (difference - computed).abs();
                assert!(
                    off <= 2e-4 + 0.01 * largest,
                    "{} element {element}: {computed}, by finite difference {difference}",
                    gradient.name
                );
            }
        }
    }
}

#[test]
fn gradients_of_layers_that_are_computed_again_are_the_same_bit_for_bit() {
    let mut random = ChaCha8Rng::seed_from_u64(4);
    for (base, name) in [("tiny-tied/base", "tiny-tied"), ("tiny-bias-headdim/base", "tiny-bias-headdim")] {
        let net = Supernet::open(base, name);
        let vocabulary = net.base.config.vocabulary as u32;
        let mut sequence = |n: usize| (0..n).map(|_| random.random_range(3..vocabulary)).collect::<Vec<_>>();
        // More targets than one stretch of the loss has rows.
        let sequences = (0..16).map(|i| Sequence::whole(sequence(2 + 3 * i % 23))).collect::<Vec<_>>();
        for threads in [1, 3] {
            for seed in [1, 2] {
                let run = |recompute: bool, dropout: f64| {
                    // The second micro-batch learns what the first gave.
                    let recipe = Recipe { dropout, seed, threads, ..Recipe::best() };
                    let backend = Reference::for_training(dropout, seed);
                    let model = net.load(&backend);
                    let (shape, space) = (net.shape.clone(), net.space.clone());
                    let data = vec![Sequence::whole(vec![3, 4]); 9];
                    let mut trainer = Trainer::new(backend, model, shape, space, recipe, data).unwrap();
                    trainer.checkpoint_gradients(recompute);
                    let mut choice = ChaCha8Rng::seed_from_u64(seed);
                    let mut losses = Vec::new();
                    for _ in 0..2 {
                        let sub_network = net.space.pick(|_, choices| choice.random_range(0..choices));
                        losses.push(trainer.step_on(&sequences, sub_network).unwrap().loss);
                    }
                    (losses, trainer.optimizer().gradients())
                };
                let remembered = run(false, 0.3);
                assert_eq!(run(true, 0.3), remembered, "{name}, {threads} threads");
                // Other masks would have been seen.
                assert_ne!(run(true, 0.0), remembered);
            }
        }
    }
}
