//! stub
#[derive(Debug, clap::Args)]
pub(super) struct ServeArgs {
    #[arg(long, default_value_t = 8080)]
    port: u16,
}
pub(super) fn run(_: &ServeArgs) -> Result<(), super::Failure> {
    Ok(())
}
