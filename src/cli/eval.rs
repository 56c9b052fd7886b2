//! stub
#[derive(Debug, clap::Args)]
pub(super) struct EvalArgs {
    #[arg(long, default_value_t = 8080)]
    port: u16,
}
pub(super) fn run(_: &EvalArgs) -> Result<(), super::Failure> {
    Ok(())
}
