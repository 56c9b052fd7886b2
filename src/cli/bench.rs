//! stub
#[derive(Debug, clap::Args)]
pub(super) struct BenchArgs {
    #[arg(long, default_value_t = 8080)]
    port: u16,
}
pub(super) fn run(_: &BenchArgs) -> Result<(), super::Failure> {
    Ok(())
}
