//! Static composition: one component inside another, so that the host sees a single one.

use anyhow::{Context, Result};
use wac_graph::types::Package;
use wac_graph::{CompositionGraph, EncodeOptions, plug};

/// Answers what `wrapper` imports with what `inner` exports and returns the result, which exports what
/// `wrapper` does. Imports that `inner` does not answer, such as `host`, stay imports, one for both.
///
/// # Errors
/// Either is no component, or `inner` exports nothing that `wrapper` imports.
pub fn compose(wrapper: &[u8], inner: &[u8]) -> Result<Vec<u8>> {
    let mut graph = CompositionGraph::new();
    let mut add = |name: &str, bytes: &[u8]| -> Result<_> {
        let package = Package::from_bytes(name, None, bytes, graph.types_mut())
            .with_context(|| format!("the {name} is not a component"))?;
        Ok(graph.register_package(package)?)
    };
    let wrapper = add("wrapper", wrapper)?;
    let inner = add("inner", inner)?;
    plug(&mut graph, vec![inner], wrapper)
        .context("the inner component exports nothing that the wrapper imports")?;
    Ok(graph.encode(EncodeOptions::default())?)
}
