//! Arguments of the commands that share plugins: `plugin push`, `pull`, `sign`, `verify`, `search`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::OutputArgs;

/// What `plugin` does with registries.
#[derive(Debug, Subcommand)]
pub enum SharingCommand {
    /// Put a component into a registry or a folder, for others to name
    Push(PluginPushArgs),
    /// Fetch a component into a file
    Pull(PluginPullArgs),
    /// Sign a file, or a component in a registry, with a minisign key
    Sign(PluginSignArgs),
    /// Say which trusted key has signed a component; fails if none has
    Verify(PluginVerifyArgs),
    /// List a repository's tags, or what a folder has
    Search(PluginSearchArgs),
}

impl SharingCommand {
    pub(super) fn output(&self) -> OutputArgs {
        match self {
            Self::Push(args) => args.output,
            Self::Pull(args) => args.output,
            Self::Sign(args) => args.output,
            Self::Verify(args) => args.output,
            Self::Search(args) => args.output,
        }
    }
}

#[derive(Args, Debug)]
pub struct PluginPushArgs {
    /// Component file
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Such as ghcr.io/me/reward:1.2 or dir:FOLDER/reward:1.2
    #[arg(value_name = "REF")]
    pub reference: String,
    /// Move a tag that stands for something else
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Args, Debug)]
pub struct PluginPullArgs {
    /// Such as ghcr.io/me/reward:1.2
    #[arg(value_name = "REF")]
    pub reference: String,
    /// File to write [default: NAME.wasm]; its signatures go beside it
    #[arg(long, short, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Replace a file that is there
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Args, Debug)]
pub struct PluginSignArgs {
    /// Component file, whose signature is written beside it, or a reference, to which it is attached
    #[arg(value_name = "FILE|REF")]
    pub plugin: String,
    /// Secret key of minisign
    #[arg(long, value_name = "FILE")]
    pub key: PathBuf,
    /// File whose first line is the key's password [default: asks, if there is one]
    #[arg(long, value_name = "FILE")]
    pub password_file: Option<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Args, Debug)]
pub struct PluginVerifyArgs {
    /// Component file with a signature beside it, or a reference
    #[arg(value_name = "FILE|REF")]
    pub plugin: String,
    /// Public key of minisign, or the file with it [default: the user's trusted_keys]; may be given several times
    #[arg(long = "key", value_name = "KEY|FILE")]
    pub keys: Vec<String>,
    #[command(flatten)]
    pub output: OutputArgs,
}

#[derive(Args, Debug)]
pub struct PluginSearchArgs {
    /// A repository such as ghcr.io/me/reward, or dir:FOLDER
    #[arg(value_name = "REPOSITORY|dir:FOLDER")]
    pub place: String,
    #[command(flatten)]
    pub output: OutputArgs,
}
