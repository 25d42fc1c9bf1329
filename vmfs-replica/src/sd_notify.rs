//! Telling the service manager how far the daemon is (`sd_notify(3)`, `Type=notify`).
//!
//! Without `NOTIFY_SOCKET` in the environment nothing happens. A manager that cannot be told is logged:
//! it is no reason not to serve.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

const VARIABLE: &str = "NOTIFY_SOCKET";

/// Tells the manager that the daemon serves: the mount is there, the control socket answers.
pub fn ready() {
    notify("READY=1");
}

/// Tells the manager that the daemon is about to end.
pub fn stopping() {
    notify("STOPPING=1");
}

fn notify(state: &str) {
    if let Some(socket) = std::env::var_os(VARIABLE)
        && let Err(error) = send(&socket, state)
    {
        tracing::warn!(%error, state, "cannot tell the service manager");
    }
}

/// Sends `state` to a socket named as in `NOTIFY_SOCKET`: a path, or `@` and an abstract name.
fn send(socket: &OsStr, state: &str) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(socket)?,
        _ => {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "NOTIFY_SOCKET is no path and no @NAME"));
        }
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(socket: &UnixDatagram) -> Vec<u8> {
        let mut buffer = [0; 64];
        let n = socket.recv(&mut buffer).unwrap();
        buffer[..n].to_vec()
    }

    #[test]
    fn state_reaches_a_path_and_an_abstract_name() {
        let path = std::env::temp_dir().join(format!("vmfs-notify-{}", std::process::id()));
        let socket = UnixDatagram::bind(&path).unwrap();
        send(path.as_os_str(), "READY=1").unwrap();
        assert_eq!(received(&socket), b"READY=1");
        std::fs::remove_file(&path).unwrap();
        let name = format!("vmfs-notify-{}", std::process::id());
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        send(OsStr::new(&format!("@{name}")), "STOPPING=1").unwrap();
        assert_eq!(received(&socket), b"STOPPING=1");
    }

    #[test]
    fn nonsense_in_the_variable_is_an_error_and_not_a_panic() {
        for bad in ["", "relative", "@", "/no/such/socket"] {
            assert!(send(OsStr::new(bad), "READY=1").is_err(), "{bad:?}");
        }
    }
}
