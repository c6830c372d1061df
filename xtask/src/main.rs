//! Stub while the crate is being laid out.
mod plugins;

fn main() -> anyhow::Result<()> {
    plugins::run(std::env::args().any(|a| a == "--check"))
}
