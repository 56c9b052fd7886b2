//! How to compute: number formats, threads, device; and the model loaded so.

use super::Failure;
use super::device::{Chosen, DeviceArg, Meter};
use super::open::{Named, Opened, selections};
use crate::backend::Backend;
use crate::backend::cpu::{Cpu, Dtype, KvDtype, LimitsMeter};
#[cfg(feature = "cuda")]
use crate::backend::cuda;
use crate::backend::reference::Reference;
use crate::model::{Adapters, Classifier, Executor, classifier, executor};
use std::sync::OnceLock;

/// How to compute.
#[derive(Debug, clap::Args)]
pub(super) struct ComputeArgs {
    /// How base weights are kept in memory; `auto` keeps them as the file has them. A processor multiplies quantised ones (also
    /// a GGUF's) with inputs rounded to 8 bits, as llama.cpp does (7 with AVX2 but no VNNI); a GPU turns them into bf16 on the
    /// way. `f32` rounds nothing.
    #[arg(long, env = "LONAS_DTYPE", value_enum, default_value_t = DtypeArg::Auto)]
    dtype: DtypeArg,

    /// How keys and values are kept in memory; `auto` is bf16, unless base weights are asked for in f32.
    #[arg(long, env = "LONAS_KV_DTYPE", value_enum, default_value_t = KvDtypeArg::Auto)]
    kv_dtype: KvDtypeArg,

    /// Add the super-adapter into the base once, instead of computing it with every token: for one model folder, and its
    /// sub-networks with all ranks (`lonas inspect` says which); others are left out. Needs `--dtype` f32, bf16 or int8.
    #[arg(long, env = "LONAS_MERGE_ADAPTER")]
    pub(super) merge_adapter: bool,

    /// Threads that compute; 0 takes all cores.
    #[arg(long, env = "LONAS_THREADS", default_value_t = 0, value_name = "N")]
    threads: usize,

    /// Where to compute: `auto` (the first GPU if there is one that can be used, else the processor), `cpu`, `cuda` or
    /// `cuda:N` (GPU number N), `reference` (slow, in f32, to compare with). On a GPU products take bf16.
    #[arg(long, env = "LONAS_DEVICE", default_value = "auto")]
    device: DeviceArg,

    /// What that came to.
    #[arg(skip)]
    chosen: OnceLock<Chosen>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum DtypeArg {
    Auto,
    F32,
    Bf16,
    Int8,
    Q4,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum KvDtypeArg {
    Auto,
    F32,
    Bf16,
}

/// Positions in one block of the key-value pool where sequences are served.
pub(super) const BLOCK_SIZE: usize = 16;

impl ComputeArgs {
    /// Loads the model with all its super-adapters, and a pool for `kv_tokens` tokens in blocks of `block_size`.
    pub(super) fn executor(
        &self,
        opened: &Opened,
        kv_tokens: usize,
        block_size: usize,
    ) -> Result<Box<dyn Executor>, Failure> {
        let blocks = (kv_tokens.div_ceil(block_size).max(1), block_size);
        match self.chosen()? {
            Chosen::Cpu => self.load(self.cpu(), opened, blocks),
            Chosen::Reference => self.load(Reference::new(), opened, blocks),
            #[cfg(feature = "cuda")]
            Chosen::Cuda(cuda) => self.load(self.formatted(cuda), opened, blocks),
        }
    }

    /// Loads a model that classifies, with all its super-adapters.
    pub(super) fn classifier(&self, opened: &Opened) -> Result<Box<dyn Classifier>, Failure> {
        let (base, orders, adapters) = (&opened.base, &opened.orders, self.adapters(opened)?);
        Ok(match self.chosen()? {
            Chosen::Cpu => classifier(self.cpu(), base, adapters, orders)?,
            Chosen::Reference => classifier(Reference::new(), base, adapters, orders)?,
            #[cfg(feature = "cuda")]
            Chosen::Cuda(cuda) => classifier(self.formatted(cuda), base, adapters, orders)?,
        })
    }

    /// The GPU with the number formats that were asked for.
    #[cfg(feature = "cuda")]
    fn formatted(&self, cuda: &cuda::Cuda) -> cuda::Cuda {
        let kv = match self.kv_dtype() {
            KvDtype::F32 => cuda::KvDtype::F32,
            KvDtype::Bf16 => cuda::KvDtype::Bf16,
        };
        let dtype = match self.dtype {
            DtypeArg::Auto => cuda::Dtype::Auto,
            DtypeArg::F32 | DtypeArg::Bf16 => cuda::Dtype::Bf16,
            DtypeArg::Int8 => cuda::Dtype::Int8,
            DtypeArg::Q4 => cuda::Dtype::Int4,
        };
        cuda.clone().with_dtype(dtype).with_kv(kv)
    }

    /// The same model on the processor in f32, where nothing is rounded, with room for one sequence of so many tokens.
    pub(super) fn exact(&self, opened: &Opened, tokens: usize) -> Result<Box<dyn Executor>, Failure> {
        let cpu = Cpu::new(Dtype::F32, self.threads);
        self.load(cpu, opened, (tokens.div_ceil(BLOCK_SIZE), BLOCK_SIZE))
    }

    /// Where it is computed; opens a GPU the first time.
    fn chosen(&self) -> Result<&Chosen, Failure> {
        if let Some(chosen) = self.chosen.get() {
            return Ok(chosen);
        }
        let for_gpu = match self.dtype {
            DtypeArg::F32 => Err("products take bf16 there, so --dtype f32 is for processors".to_owned()),
            _ => Ok(()),
        };
        let chosen = self.device.choose(for_gpu)?;
        Ok(self.chosen.get_or_init(|| chosen))
    }

    fn load<B: Backend>(
        &self,
        backend: B,
        opened: &Opened,
        pool: (usize, usize),
    ) -> Result<Box<dyn Executor>, Failure> {
        Ok(executor(backend, &opened.base, self.adapters(opened)?, &opened.orders, pool)?)
    }

    /// The super-adapters as they are to stand beside the base or in it.
    fn adapters(&self, opened: &Opened) -> Result<Adapters, Failure> {
        let mut adapters = opened.super_adapters()?;
        let merged = if self.merge_adapter { adapters.pop() } else { None };
        Ok(merged.map_or(Adapters::Beside(adapters), Adapters::Merged))
    }

    /// Every sub-network that can be computed so, model by model in catalog order, with ids that are unique in the process.
    ///
    /// # Errors
    /// A super-adapter that cannot be merged.
    pub(super) fn selections(&self, opened: &Opened) -> Result<Vec<Named>, Failure> {
        let all = selections(opened);
        if !self.merge_adapter {
            return Ok(all);
        }
        let [model] = opened.models.as_slice() else {
            return Err(
                "--merge-adapter: one base can take in one super-adapter, so name one model folder".into()
            );
        };
        if !matches!(self.chosen()?, Chosen::Reference) && matches!(self.dtype, DtypeArg::Auto | DtypeArg::Q4)
        {
            let dtype = self.dtype_said();
            return Err(format!(
                "--merge-adapter --dtype {dtype}: the merged weights are other numbers than the base's file has; \
                 say how to keep them with --dtype f32, bf16 or int8"
            )
            .into());
        }
        let (kept, left_out): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|(_, selection)| model.shape.keeps_ranks(&selection.shape));
        let names =
            |named: &[Named]| named.iter().map(|((_, n), _)| n.as_str()).collect::<Vec<_>>().join(", ");
        if kept.is_empty() {
            return Err(format!(
                "--merge-adapter: no sub-network of `{}` has all ranks ({})",
                model.folder.name,
                names(&left_out)
            )
            .into());
        }
        if !left_out.is_empty() {
            tracing::warn!("--merge-adapter leaves out what has not all ranks: {}", names(&left_out));
        }
        Ok(kept)
    }

    /// Our own kernels with the threads that were asked for.
    pub(super) fn cpu(&self) -> Cpu {
        let dtype = match self.dtype {
            DtypeArg::Auto => Dtype::Auto,
            DtypeArg::F32 => Dtype::F32,
            DtypeArg::Bf16 => Dtype::Bf16,
            DtypeArg::Int8 => Dtype::Int8,
            DtypeArg::Q4 => Dtype::Q4,
        };
        Cpu::new(dtype, self.threads).with_kv(self.kv_dtype())
    }

    fn kv_dtype(&self) -> KvDtype {
        match (self.kv_dtype, self.dtype) {
            (KvDtypeArg::F32, _) | (KvDtypeArg::Auto, DtypeArg::F32) => KvDtype::F32,
            (KvDtypeArg::Bf16, _) | (KvDtypeArg::Auto, _) => KvDtype::Bf16,
        }
    }

    /// As the option says it.
    fn dtype_said(&self) -> &'static str {
        match self.dtype {
            DtypeArg::Auto => "auto",
            DtypeArg::F32 => "f32",
            DtypeArg::Bf16 => "bf16",
            DtypeArg::Int8 => "int8",
            DtypeArg::Q4 => "q4",
        }
    }

    /// How base weights are kept.
    pub(super) fn dtype_name(&self) -> Result<&'static str, Failure> {
        Ok(match self.chosen()? {
            Chosen::Cpu => self.dtype_said(),
            Chosen::Reference => "f32",
            #[cfg(feature = "cuda")]
            Chosen::Cuda(_) => self.dtype_said(),
        })
    }

    pub(super) fn device_name(&self) -> Result<&'static str, Failure> {
        Ok(match self.chosen()? {
            Chosen::Cpu => "cpu",
            Chosen::Reference => "reference",
            #[cfg(feature = "cuda")]
            Chosen::Cuda(_) => "cuda",
        })
    }

    /// What measures the limits of where it is computed; of the processor beside the reference.
    pub(super) fn meter<'a>(&'a self, cpu: &'a Cpu) -> Result<Meter<'a>, Failure> {
        Ok(match self.chosen()? {
            #[cfg(feature = "cuda")]
            Chosen::Cuda(cuda) => Meter::Cuda(cuda::LimitsMeter::new(cuda)?),
            _ => Meter::Cpu(LimitsMeter::new(cpu)?),
        })
    }

    /// The GPU, if it is one.
    #[cfg(feature = "cuda")]
    pub(super) fn gpu(&self) -> Result<Option<&cuda::Cuda>, Failure> {
        Ok(match self.chosen()? {
            Chosen::Cuda(cuda) => Some(cuda),
            _ => None,
        })
    }

    /// How the GPU is called, if it is one.
    pub(super) fn gpu_name(&self) -> Result<Option<String>, Failure> {
        Ok(match self.chosen()? {
            #[cfg(feature = "cuda")]
            Chosen::Cuda(cuda) => Some(cuda.name().to_owned()),
            _ => None,
        })
    }

    /// For people: number formats.
    pub(super) fn numbers(&self) -> Result<String, Failure> {
        let kv = match self.kv_dtype() {
            KvDtype::F32 => "f32",
            KvDtype::Bf16 => "bf16",
        };
        let merged = if self.merge_adapter { " with the adapter merged into it" } else { "" };
        Ok(format!("base as {}{merged}, keys and values as {kv}", self.dtype_name()?))
    }

    /// For people: device, instructions, threads, number format.
    pub(super) fn describe(&self) -> Result<String, Failure> {
        let numbers = self.numbers()?;
        Ok(match self.chosen()? {
            Chosen::Cpu => {
                let cpu = self.cpu();
                format!("cpu, {}, {} threads, {numbers}", cpu.instructions(), cpu.threads())
            }
            Chosen::Reference => "reference backend, f32".into(),
            #[cfg(feature = "cuda")]
            Chosen::Cuda(cuda) => {
                let (free, total) = cuda.memory()?;
                format!("{}, {numbers}, {} of {} MiB left", cuda.name(), free >> 20, total >> 20)
            }
        })
    }
}
