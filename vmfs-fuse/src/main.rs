//! The `vmfs-fuse` daemon.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmfs_fuse::daemon::main()
}
