//! `lonas random`

use super::Failure;
use super::open;
use super::progress::Progress;
use super::space::SpaceFile;
use crate::artifact::{
    AdapterTensors, BaseReference, BaseSource, ModelFolder, TensorType, read_base_config, write_adapter,
    write_random_base,
};
use crate::model::{base_tensors, model_shape, search_space};
use crate::supernet::{Catalog, is_model_name};
use crate::weights::{HostData, HostMatrix};
use clap::Args;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::path::PathBuf;

/// Write a super-network of random weights, to measure a shape before there is a model of it.
///
/// The base goes to OUT/base, in bf16, with a tokenizer of single bytes; the model folder is OUT itself. Its catalog has one
/// more sub-network, `uneven`, of random choices. Everything takes it as any other super-network; what it says makes no sense.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  lonas random --config benches/shapes/llama-7b/config.json \
    --space benches/shapes/llama-7b/space.json --out llama-7b\n  lonas bench llama-7b")]
pub(super) struct RandomArgs {
    /// The base's sizes, as Hugging Face writes them.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,

    /// The search space, as for `lonas train`.
    #[arg(long, value_name = "FILE")]
    space: PathBuf,

    /// The model folder to write.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Replace the super-network that is there.
    #[arg(long)]
    overwrite: bool,
}

/// One more sub-network, with another choice in each group.
const UNEVEN: &str = "uneven";

pub(super) fn run(args: &RandomArgs) -> Result<(), Failure> {
    let (out, name) = (args.out.display(), open::name_of(&args.out));
    if !is_model_name(&name) {
        return Err(
            format!("--out: a model named `{name}` could not be asked for: no colon and no space").into()
        );
    }
    if args.out.exists() && !args.overwrite {
        return Err(format!("{out} exists; give another --out, or --overwrite").into());
    }
    let empty = std::fs::read_dir(&args.out).map_or(true, |mut entries| entries.next().is_none());
    if !empty && !args.out.join("supernet.json").exists() {
        return Err(format!("{out} holds no super-network that could be replaced; give another --out").into());
    }
    let config = read_base_config(&args.config)?;
    let file = SpaceFile::read(&args.space)?;
    let adapter = file.adapter(config.family, 0.0, name.clone())?;
    let shape = model_shape(&config, Some(&adapter));
    let space = search_space(&config, &shape, file.groups())?;

    let tensors = base_tensors(&config);
    let bytes = tensors.iter().map(|t| 2 * t.shape.iter().product::<usize>()).sum::<usize>();
    tracing::info!("writing {:.1} GB of random weights into {out}", bytes as f64 / 1e9);
    let base = args.out.join("base");
    let mut progress = Progress::new("tensor", tensors.len() as u64, 0);
    write_random_base(&base, &args.config, &tensors, args.seed, |done| progress.set(done, ""))?;
    progress.finish();
    let reference = BaseReference { source: BaseSource::Path(open::place(&base)?), sha256: None };
    write_adapter(&args.out, &adapter, &random_adapter(&shape, args.seed), TensorType::Bf16)?;
    let orders = std::collections::BTreeMap::new();
    ModelFolder::write_supernet(&args.out, &name, &reference, adapter.scale(), &shape, &space, &orders)?;
    let mut catalog = Catalog::new(&shape, &space);
    let mut random = ChaCha8Rng::seed_from_u64(args.seed);
    catalog.add(&shape, &space, UNEVEN, space.pick(|_, choices| random.random_range(0..choices)))?;
    ModelFolder::open(&args.out)?.write_catalog(&catalog)?;
    tracing::info!("wrote it; measure it with: lonas bench {out}");
    Ok(())
}

/// A and B that both count, unlike a fresh adapter's.
fn random_adapter(shape: &crate::supernet::ModelShape, seed: u64) -> AdapterTensors {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut matrix = |name: String, rows: usize, columns: usize| {
        let data = (0..rows * columns).map(|_| random.random_range(-0.03..0.03)).collect();
        HostMatrix { name, rows, columns, data: HostData::F32(data) }
    };
    let adapted = shape.linears.iter().filter_map(|linear| {
        let rank = linear.rank?;
        let a = matrix(format!("{}.lora_A.weight", linear.name), rank, linear.inp);
        let b = matrix(format!("{}.lora_B.weight", linear.name), linear.out, rank);
        Some((linear.name.clone(), (a, b)))
    });
    adapted.collect()
}
