//! stub
#[derive(Debug, clap::Args)]
pub(super) struct InspectArgs {
    #[arg(long, default_value_t = 8080)]
    port: u16,
}
pub(super) fn run(_: &InspectArgs) -> Result<(), super::Failure> {
    Ok(())
}
