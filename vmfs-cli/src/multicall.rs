//! One binary, three programs: started under the name `vmfs-fuse` or `vmfs-replica` this *is* that
//! daemon, so that `vmfs up` needs nothing but itself.

use std::ffi::OsStr;
use std::path::Path;
use std::process::ExitCode;

/// The daemon that the program's name stands for, not started yet.
pub(crate) fn daemon(program: &OsStr) -> Option<fn() -> ExitCode> {
    match Path::new(program).file_name()?.to_str()? {
        "vmfs-fuse" => Some(vmfs_fuse::daemon::main),
        "vmfs-replica" => Some(vmfs_replica::daemon::main),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_decides_whatever_the_directory() {
        for (name, is_daemon) in [
            ("vmfs-fuse", true),
            ("/usr/sbin/vmfs-replica", true),
            ("vmfs", false),
            ("/x/vmfs-fuse/vmfs", false),
            ("", false),
        ] {
            assert_eq!(daemon(OsStr::new(name)).is_some(), is_daemon, "{name}");
        }
    }
}
