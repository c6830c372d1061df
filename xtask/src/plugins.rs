//! Building of the shipped plugins; nothing to build yet.

/// Builds `plugins/dist`, or with `check_only` tells whether it is up to date.
pub(crate) fn run(_check_only: bool) -> anyhow::Result<()> {
    Ok(())
}
