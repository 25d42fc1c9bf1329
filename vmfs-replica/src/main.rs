//! The `vmfs-replica` daemon.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmfs_replica::daemon::main()
}
