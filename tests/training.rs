//! Training against PyTorch + PEFT: ten optimizer steps, every gradient.

use crate::golden::{self, Supernet};
use lonas::backend::Backend;
use lonas::backend::reference::{Compute, NamedTensor, Reference};
use lonas::model::{Batch, Orders, llama};
use lonas::train::{Recipe, Sampling, Sequence, TrainError, Trainer, importance_orders};
use std::collections::BTreeMap;

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
    /// Tokens at each sequence's beginning that are not learnt.
    #[serde(default)]
    given: Vec<usize>,
    choices: Vec<usize>,
    loss: f32,
    learning_rate: f64,
    gradient_norm: Option<f64>,
}

impl MicroBatch {
    fn sequences(&self) -> Vec<Sequence> {
        let given = self.given.iter().copied().chain(std::iter::repeat(0));
        self.sequences.iter().cloned().zip(given).map(|(tokens, given)| Sequence { tokens, given }).collect()
    }
}

fn trainer(net: &Supernet, recipe: Recipe, sequences: Vec<Sequence>) -> Trainer {
    trainer_on(Compute::cpu(), net, recipe, sequences)
}

fn trainer_on(compute: Compute, net: &Supernet, recipe: Recipe, sequences: Vec<Sequence>) -> Trainer {
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
        ("sandwich", 1, &ours),
        ("sandwich", 2, &ours),
        ("sandwich", 5, &ours),
        ("sandwich", 1, &composed),
        ("sandwich", 2, &composed),
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
            ..if name == "sandwich" { Recipe::best() } else { Recipe::default() }
        };
        // The data's length decides the schedule; the micro-batches themselves are the golden ones.
        let mut trainer =
            trainer_on(compute.clone(), &net, recipe, vec![Sequence::whole(vec![3, 4]); golden.sequences]);
        trainer.checkpoint_gradients(compute.is_composed());
        assert_eq!(trainer.total(), golden.micro_batches.len() as u64);
        assert!(golden.micro_batches.iter().any(|m| m.given.iter().any(|&g| g > 1)) == (name == "sandwich"));
        for (i, expected) in golden.micro_batches.iter().enumerate() {
            let sub_network = net.space.sub_network(expected.choices.clone()).unwrap();
            let done = trainer.step_on(&expected.sequences(), sub_network).unwrap();
            let off = (done.loss - expected.loss).abs();
            assert!(off < 2e-4, "{name} micro-batch {i}: loss {} not {}", done.loss, expected.loss);
            assert_eq!(done.distilled, name == "sandwich" && i % 2 == 1);
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
    let mut trainer = trainer(&net, recipe, vec![Sequence::whole(vec![3, 4]); 9]);
    let sub_network = net.space.sub_network(first.choices.clone()).unwrap();
    trainer.step_on(&first.sequences(), sub_network).unwrap();
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
fn a_sandwich_is_the_maximal_network_then_the_minimal_or_a_random_one_on_the_same_sequences() {
    let net = Supernet::open("tiny-tied/base", "tiny-tied");
    let sequences = (3..43).map(|n| Sequence::whole(vec![n, n + 1, n + 2])).collect::<Vec<_>>();
    let recipe = Recipe {
        sampling: Sampling::Sandwich,
        micro_batch: 2,
        accumulation: 2,
        epochs: 1,
        ..Recipe::default()
    };
    let mut trainer = trainer(&net, recipe, sequences);
    let done = (0..trainer.total()).map(|_| trainer.step().unwrap()).collect::<Vec<_>>();
    assert_eq!(done.len(), 40);
    let (maximal, minimal) = (net.space.maximal(), net.space.minimal());
    assert!(done.iter().step_by(2).all(|m| m.sub_network == maximal));
    assert!(done.iter().skip(1).step_by(4).all(|m| m.sub_network == minimal));
    let random = done.iter().skip(3).step_by(4).map(|m| &m.sub_network).collect::<Vec<_>>();
    assert!(random.windows(2).any(|w| w[0] != w[1]) && random.iter().any(|&s| *s != minimal));
    // Without distillation a student learns the text.
    assert!(done.iter().all(|m| !m.distilled && m.tokens == 4 && m.trained_tokens == 6));
}

#[test]
fn several_students_are_the_minimal_network_and_random_ones_and_learn_from_one_teacher() {
    let net = Supernet::open("tiny-tied/base", "tiny-tied");
    let sequences = (3..43).map(|n| Sequence::whole(vec![n, n + 1, n + 2])).collect::<Vec<_>>();
    let recipe = Recipe { students: 3, micro_batch: 2, epochs: 1, ..Recipe::best() };
    let mut trainer = trainer(&net, recipe, sequences);
    let done = (0..trainer.total()).map(|_| trainer.step().unwrap()).collect::<Vec<_>>();
    assert_eq!(done.len(), 80);
    let mut random = Vec::new();
    for batch in done.chunks(4) {
        assert_eq!(batch.iter().map(|m| m.distilled).collect::<Vec<_>>(), [false, true, true, true]);
        assert_eq!(
            [&batch[0].sub_network, &batch[1].sub_network],
            [&net.space.maximal(), &net.space.minimal()]
        );
        random.extend(batch[2..].iter().map(|m| &m.sub_network));
        // One step for all four, at its end.
        assert_eq!(batch.iter().filter(|m| m.gradient_norm.is_some()).count(), 1);
    }
    assert!(random.windows(2).any(|w| w[0] != w[1]) && random.iter().any(|&s| *s != net.space.minimal()));
}

#[test]
fn every_student_learns_from_the_maximal_network_not_from_the_student_before() {
    let net = Supernet::open("tiny-tied/base", "tiny-tied");
    let sequences = (3..7).map(|n| Sequence::whole(vec![n, n + 1, n + 2])).collect::<Vec<_>>();
    let recipe = Recipe { students: 2, accumulation: 3, dropout: 0.0, ..Recipe::best() };
    let mut trainer = trainer(&net, recipe, sequences.clone());
    let losses = [net.space.maximal(), net.space.minimal(), net.space.minimal()]
        .map(|sub_network| trainer.step_on(&sequences, sub_network).unwrap().loss);
    // The weights change at the end of a step only, so the same student is as far from the same teacher; from itself it
    // would be at zero.
    assert_eq!(losses[1], losses[2]);
    assert!(losses[1] > 1e-4, "{losses:?}");
}

#[test]
fn plain_lora_trains_the_maximal_network_only_and_ends_where_its_tokens_do() {
    let net = Supernet::open("tiny-tied/base", "tiny-tied");
    let sequences = (3..43).map(|n| Sequence { tokens: vec![n, n + 1, n + 2], given: 2 }).collect();
    let recipe = Recipe {
        sampling: Sampling::Maximal,
        max_tokens: Some(125),
        micro_batch: 4,
        accumulation: 2,
        ..Recipe::default()
    };
    let mut trainer = trainer(&net, recipe, sequences);
    // 12 tokens a micro-batch: ten are an epoch of 120, eleven would do, twelve are whole windows.
    assert_eq!(trainer.total(), 12);
    let done = (0..12).map(|_| trainer.step().unwrap()).collect::<Vec<_>>();
    assert!(done.iter().all(|m| m.sub_network == net.space.maximal() && m.tokens == 4));
    assert_eq!(done.iter().map(|m| m.trained_tokens).sum::<usize>(), 144);
    // By hand: the twelfth of twelve, in the second epoch, so one less as in NNCF: 0.5 (1 + cos(11/12 pi)).
    assert!((done[11].learning_rate / 3e-4 - 0.017_037_086_855_466).abs() < 1e-12);
}

#[test]
fn a_student_without_its_teacher_is_refused() {
    let net = Supernet::open("tiny-tied/base", "tiny-tied");
    let sequences = vec![Sequence::whole(vec![3, 4, 5]); 9];
    let mut trainer = trainer(&net, Recipe { dropout: 0.0, ..Recipe::best() }, sequences.clone());
    trainer.step_on(&sequences[..2], net.space.maximal()).unwrap();
    let error = trainer.step_on(&sequences[..3], net.space.minimal()).unwrap_err();
    assert!(matches!(error, TrainError::NoTeacher { micro_batch: 2 }), "{error}");
}

#[test]
fn what_is_given_teaches_nothing() {
    let net = Supernet::open("tiny-tied/base", "tiny-tied");
    let loss = |prompt: &[u32], response: &[u32], given: usize| {
        let tokens = [prompt, response].concat();
        let trainer = trainer(&net, Recipe::default(), vec![Sequence::whole(vec![3, 4]); 9]);
        trainer.loss_of(&[Sequence { tokens, given }], &net.space.maximal()).unwrap()
    };
    let (prompt, response) = ([7, 50, 9, 13], [21, 8, 40]);
    let (all, of_prompt) = (loss(&prompt, &response, 0), loss(&prompt, &[], 0));
    let of_response = loss(&prompt, &response, prompt.len());
    // Six targets, three of them the prompt's.
    assert!((all - (3.0 * of_prompt + 3.0 * of_response) / 6.0).abs() < 1e-5);
    assert!((of_response - of_prompt).abs() > 1e-2);
}

#[test]
fn a_gradient_through_bf16_weights_is_that_of_f32_but_for_rounding() {
    // A base whose weights are bf16 already: what differs is that every product rounds its input and its result.
    let net = Supernet::open("tiny-untied-bf16/base", "tiny-untied-bf16");
    let sequences = [11, 2, 7].map(|n| Sequence::whole((0..n).map(|i| 3 + i * 17 % 80).collect()));
    let sub_network = net.space.pick(|group, choices| (group + 1) % choices);
    let run = |compute: Compute| {
        let recipe = Recipe { dropout: 0.2, accumulation: 2, ..Recipe::default() };
        let mut trainer = trainer_on(compute, &net, recipe, vec![Sequence::whole(vec![3, 4]); 9]);
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

/// What a layer's attention adds to its input, of the base with its heads in this order, by a sub-network that leaves the
/// layer's MLP out.
fn attention_adds(net: &Supernet, heads: &[usize], choices: Vec<usize>, tokens: &[u32]) -> Vec<f32> {
    const LAYER: usize = 1;
    let backend = Reference::new();
    let orders = Orders { heads: BTreeMap::from([(LAYER, heads.to_vec())]), ..Orders::default() };
    let model = llama::load(&backend, &net.base, Vec::new(), &orders).unwrap();
    let mut batch = Batch::default();
    let sub_network = net.space.sub_network(choices).unwrap();
    golden::push(&mut batch, net.selection(0, &sub_network), tokens, 0, &[]);
    let pass = model.pass(&backend, &batch).unwrap();
    let x = pass.layer(0, pass.embed().unwrap(), None).unwrap();
    let y = pass.layer(LAYER, x.clone(), None).unwrap();
    let [x, y] = [x, y].map(|rows| backend.host(rows).unwrap());
    y.iter().zip(x).map(|(y, x)| y - x).collect()
}

#[test]
fn heads_are_put_in_the_order_in_which_leaving_them_out_changes_least() {
    let net = Supernet::open("tiny-depth/base", "tiny-depth");
    let choices = |heads| [[8; 4], [40, 0, 40, 40], [8; 4], [32, heads, 32, 32]].concat();
    let mut seen = [false; 2];
    for seed in 0..12 {
        let tokens = (0..20).map(|i| 3 + (i * i + seed * 7 + i * seed) % 54).collect::<Vec<u32>>();
        let sequences = [Sequence::whole(tokens.clone())];
        let orders = importance_orders(&net.base, &net.space, &sequences, Compute::cpu()).unwrap();
        let whole = attention_adds(&net, &[0, 1], choices(32), &tokens);
        let lost = |first: usize| {
            let kept = attention_adds(&net, &[first, 1 - first], choices(16), &tokens);
            kept.iter().zip(&whole).map(|(kept, whole)| (kept - whole) * (kept - whole)).sum::<f32>()
        };
        let first = usize::from(lost(1) < lost(0));
        assert_eq!(orders.heads[&1], [first, 1 - first], "{} {}", lost(0), lost(1));
        seen[first] = true;
        // What is not elastic stays where it is; channels are ordered in every layer.
        assert_eq!(orders.heads.keys().copied().collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(orders.channels.len(), 4);
    }
    assert_eq!(seen, [true; 2], "one order alone would not show that the data decide");
    let fixed = Supernet::open("tiny-tied/base", "tiny-tied");
    let sequences = [Sequence::whole(vec![5, 9, 3, 8])];
    let orders = importance_orders(&fixed.base, &fixed.space, &sequences, Compute::cpu()).unwrap();
    assert!(orders.heads.is_empty() && orders.channels.len() == 3);
}
