//! `portolan-csi controller`.

/// Options
#[derive(Clone, Debug, clap::Args)]
pub struct Options {}

/// Run
pub async fn run(_: Options, _: tokio_util::sync::CancellationToken) -> anyhow::Result<()> {
    Ok(())
}
