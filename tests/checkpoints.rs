//! Training that is killed and goes on: the same losses and values as one that was not.

use crate::files::{Folder, assert_names};
use crate::golden::Supernet;
use lonas::backend::reference::Reference;
use lonas::train::{Checkpoint, Recipe, Sampling, Sequence, TrainError, Trainer};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;

const FILE: &str = "checkpoint.safetensors";

fn recipe() -> Recipe {
    Recipe {
        epochs: 2,
        micro_batch: 2,
        accumulation: 2,
        learning_rate: 3e-3,
        weight_decay: 0.1,
        dropout: 0.1,
        threads: 2,
        ..Recipe::default()
    }
}

fn trainer(net: &Supernet, recipe: Recipe) -> Trainer {
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let mut sequence = |n| (0..n).map(|_| random.random_range(3..97)).collect::<Vec<u32>>();
    let sequences = (0..10).map(|i| Sequence { tokens: sequence(3 + i % 4), given: i % 3 }).collect();
    let backend = Reference::for_training(recipe.dropout, recipe.seed);
    let model = net.load(&backend);
    Trainer::new(backend, model, net.shape.clone(), net.space.clone(), recipe, sequences).unwrap()
}

fn checkpoint(recipe: &Recipe) -> Checkpoint {
    Checkpoint { recipe: recipe.clone(), inputs: inputs("base, space and data") }
}

fn inputs(digest: &str) -> BTreeMap<String, String> {
    [("the base".to_string(), digest.to_string()), ("the examples".into(), "e".into())].into()
}

#[test]
fn a_killed_training_that_goes_on_ends_where_an_uninterrupted_one_does() {
    let sandwich = Recipe { sampling: Sampling::Sandwich, distill: true, length_buckets: true, ..recipe() };
    for (recipe, total) in [
        (recipe(), 10),
        (sandwich.clone(), 20),
        (Recipe { max_tokens: Some(147), ..sandwich.clone() }, 18),
        (Recipe { students: 2, accumulation: 3, ..sandwich }, 30),
    ] {
        goes_on(&recipe, total);
    }
}

fn goes_on(recipe: &Recipe, total: u64) {
    let recipe = || recipe.clone();
    let net = Supernet::open("tiny-tied/base", "tiny-tied");
    let mut whole = trainer(&net, recipe());
    assert_eq!(whole.total(), total);
    let expected = (0..total).map(|_| whole.step().unwrap()).collect::<Vec<_>>();
    // Dropout and the choice of sub-networks are at work, else nothing would have to be continued.
    assert!(expected.iter().any(|m| m.sub_network != expected[0].sub_network));

    let window = recipe().accumulation;
    for killed_after in [1, 2, 3].map(|windows| windows * window) {
        let folder = Folder::empty();
        let checkpoint = checkpoint(&recipe());
        let mut first = trainer(&net, recipe());
        assert!(!checkpoint.resume(&folder.file(FILE), &mut first).unwrap());
        for m in &expected[..killed_after] {
            assert!(
                first.done() == 0 || first.between_windows() == first.done().is_multiple_of(window as u64)
            );
            assert_eq!(&first.step().unwrap(), m);
        }
        checkpoint.save(&folder.file(FILE), &first).unwrap();
        // What was computed after the checkpoint is lost with the process.
        first.step().unwrap();
        drop(first);

        let mut second = trainer(&net, recipe());
        assert!(checkpoint.resume(&folder.file(FILE), &mut second).unwrap());
        assert_eq!(second.done(), killed_after as u64);
        for m in &expected[killed_after..] {
            assert_eq!(&second.step().unwrap(), m);
        }
        assert_eq!(second.optimizer().values(), whole.optimizer().values());
    }
}

#[test]
fn a_checkpoint_of_another_training_is_refused_by_what_differs() {
    let net = Supernet::open("tiny-tied/base", "tiny-tied");
    let folder = Folder::empty();
    let path = folder.file(FILE);
    let mut trained = trainer(&net, recipe());
    trained.step().unwrap();
    trained.step().unwrap();
    checkpoint(&recipe()).save(&path, &trained).unwrap();

    let other_recipes = [
        (Recipe { seed: 43, ..recipe() }, "(seed was 42, not 43)"),
        (Recipe { dropout: 0.0, ..recipe() }, "(dropout was 0.1, not 0.0)"),
        (Recipe { learning_rate: 3.1e-3, ..recipe() }, "(learning rate was 0.003, not 0.0031)"),
        (Recipe { epochs: 3, ..recipe() }, "(epochs was 2, not 3)"),
        (Recipe { threads: 1, ..recipe() }, "(threads was 2, not 1)"),
        (Recipe { bf16_base: true, ..recipe() }, "(bf16 base was false, not true)"),
        (Recipe { sampling: Sampling::Maximal, ..recipe() }, "(sampling was random, not maximal)"),
        (Recipe { response_only: true, ..recipe() }, "(response only was false, not true)"),
        (
            Recipe { length_buckets: true, max_tokens: Some(100), ..recipe() },
            "(length buckets was false, not true; max tokens was none, not 100)",
        ),
    ];
    for (other, named) in other_recipes {
        let error = checkpoint(&other).resume(&path, &mut trainer(&net, other.clone())).unwrap_err();
        assert!(matches!(error, TrainError::OtherTraining { .. }), "{error}");
        assert_names(&error.to_string(), &[FILE, named]);
    }
    let other = Checkpoint { inputs: inputs("another base"), ..checkpoint(&recipe()) };
    let error = other.resume(&path, &mut trainer(&net, recipe())).unwrap_err();
    assert_names(&error.to_string(), &[FILE, "(the base: not the same)"]);
}

#[test]
fn nothing_is_left_beside_a_checkpoint() {
    let net = Supernet::open("tiny-tied/base", "tiny-tied");
    let folder = Folder::empty();
    let names = || {
        let entries = std::fs::read_dir(folder.path()).unwrap();
        let mut names = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>();
        names.sort();
        names
    };
    checkpoint(&recipe()).save(&folder.file(FILE), &trainer(&net, recipe())).unwrap();
    assert_eq!(names(), [FILE]);
    // A place that cannot be replaced.
    std::fs::create_dir_all(folder.file("taken/inside")).unwrap();
    let error = checkpoint(&recipe()).save(&folder.file("taken"), &trainer(&net, recipe())).unwrap_err();
    assert_names(&error.to_string(), &["taken"]);
    assert_eq!(names(), [FILE, "taken"]);
    // What a kill leaves.
    folder.write("checkpoint.safetensorsAbC123.partial", "half");
    folder.write("other.partial", "somebody else's");
    Checkpoint::remove_unfinished(&folder.file(FILE)).unwrap();
    assert_eq!(names(), [FILE, "other.partial", "taken"]);
}

#[test]
fn a_damaged_checkpoint_is_refused_and_never_half_used() {
    let net = Supernet::open("tiny-tied/base", "tiny-tied");
    let folder = Folder::empty();
    let path = folder.file(FILE);
    let checkpoint = checkpoint(&recipe());
    let mut trained = trainer(&net, recipe());
    trained.step().unwrap();
    trained.step().unwrap();
    checkpoint.save(&path, &trained).unwrap();
    let whole = folder.read(FILE);
    let mut fresh = trainer(&net, recipe());
    let start = fresh.optimizer().values();
    assert_ne!(start, trained.optimizer().values());
    for length in [0, 1, 8, 100, 2000, whole.len() / 2, whole.len() - 1] {
        folder.write(FILE, &whole[..length]);
        let error = checkpoint.resume(&path, &mut fresh).unwrap_err();
        assert!(matches!(error, TrainError::Checkpoint { .. }), "{error}");
        assert_names(&error.to_string(), &[FILE]);
        assert_eq!((fresh.done(), fresh.optimizer().values()), (0, start.clone()));
    }
    // A safetensors file, but none of ours.
    std::fs::copy(net.folder.path().join("adapter_model.safetensors"), &path).unwrap();
    assert_names(&checkpoint.resume(&path, &mut fresh).unwrap_err().to_string(), &[FILE, "not a checkpoint"]);
    // Of the same recipe, but for a model with other tensors.
    let other = Supernet::open("tiny-untied-bf16/base", "tiny-untied-bf16");
    checkpoint.save(&path, &trainer(&other, recipe())).unwrap();
    let error = checkpoint.resume(&path, &mut fresh).unwrap_err().to_string();
    assert_names(&error, &["restore", "lora_"]);
    assert_eq!(fresh.done(), 0);
}
