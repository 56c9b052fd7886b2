//! Where to compute: what `--device` says, and what this machine has.

use super::Failure;
use crate::backend::cpu::{Limits, LimitsMeter};
#[cfg(feature = "cuda")]
use crate::backend::cuda::{self, Cuda};
use std::str::FromStr;

/// What `--device` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum DeviceArg {
    /// The first GPU, where there is one that can be used, else the processor.
    #[default]
    Auto,
    /// Our own kernels for processors.
    Cpu,
    /// Our own kernels for NVIDIA GPUs, on the one of this number.
    Cuda(usize),
    /// The slow reference in f32, to compare with.
    Reference,
}

impl FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "reference" => Ok(Self::Reference),
            _ => {
                let number = text.strip_prefix("cuda:").and_then(|number| number.parse().ok());
                number.map(Self::Cuda).ok_or_else(|| "expected auto, cpu, cuda, cuda:N or reference".into())
            }
        }
    }
}

/// Where it is computed.
#[derive(Debug, Clone)]
pub(super) enum Chosen {
    Cpu,
    Reference,
    #[cfg(feature = "cuda")]
    Cuda(Cuda),
}

/// Measures what the processor, or a GPU, can do at most.
pub(super) enum Meter<'a> {
    Cpu(LimitsMeter<'a>),
    #[cfg(feature = "cuda")]
    Cuda(cuda::LimitsMeter<'a>),
}

impl Meter<'_> {
    pub(super) fn measure(&self) -> Result<Limits, Failure> {
        match self {
            Self::Cpu(meter) => Ok(meter.measure()),
            #[cfg(feature = "cuda")]
            Self::Cuda(meter) => {
                let cuda::Limits { read_bytes_per_second, f32_flops, bf16_flops } = meter.measure()?;
                Ok(Limits { read_bytes_per_second, f32_flops, bf16_flops: Some(bf16_flops), int8_ops: None })
            }
        }
    }
}

impl DeviceArg {
    /// `for_gpu`: whether the other options go with a GPU; if not, why.
    ///
    /// # Errors
    /// A GPU was asked for, and cannot be used.
    pub(super) fn choose(self, for_gpu: Result<(), String>) -> Result<Chosen, Failure> {
        match self {
            Self::Cpu => Ok(Chosen::Cpu),
            Self::Reference => Ok(Chosen::Reference),
            Self::Cuda(ordinal) => {
                for_gpu.map_err(|why| format!("--device cuda: {why}"))?;
                open(ordinal).map_err(|why| format!("--device cuda:{ordinal}: {why}").into())
            }
            Self::Auto => Ok(for_gpu.and_then(|()| open(0)).unwrap_or_else(|why| {
                if cfg!(feature = "cuda") {
                    tracing::info!("computing on the processor: {why}");
                }
                Chosen::Cpu
            })),
        }
    }
}

#[cfg(feature = "cuda")]
fn open(ordinal: usize) -> Result<Chosen, String> {
    Cuda::open(ordinal).map(Chosen::Cuda).map_err(|error| error.to_string())
}

#[cfg(not(feature = "cuda"))]
fn open(_ordinal: usize) -> Result<Chosen, String> {
    Err("this lonas was built without GPUs; build it with `cargo build --release --features cuda`".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_usual() {
        let parse = |text: &str| text.parse::<DeviceArg>();
        assert_eq!(parse("auto"), Ok(DeviceArg::Auto));
        assert_eq!(parse("cuda"), Ok(DeviceArg::Cuda(0)));
        assert_eq!(parse("cuda:3"), Ok(DeviceArg::Cuda(3)));
        for wrong in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_does_not_go_with_a_gpu_takes_the_processor_or_is_refused() {
        let unfit = || Err("--dtype int8 is not for GPUs".to_owned());
        assert!(matches!(DeviceArg::Auto.choose(unfit()), Ok(Chosen::Cpu)));
        let refused = DeviceArg::Cuda(0).choose(unfit()).unwrap_err().to_string();
        assert!(refused.contains("--device cuda") && refused.contains("int8"), "{refused}");
    }
}
