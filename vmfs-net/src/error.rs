//! What the network layer reports: [`NetError`] to callers, [`Refusal`] for what a peer did wrong.

use std::net::SocketAddr;

use vmfs_common::HostId;

use crate::pki::PkiError;

/// Why a connection was refused or given up, by us or by the peer. Each has a QUIC close code, a
/// counter ([`crate::Network::counters`]) and is logged once per peer until that peer gets through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Refusal {
    /// No protocol version in common.
    Version,
    /// The peer belongs to another datastore: its CA is not ours.
    OtherDatastore,
    /// A certificate outside of its validity.
    Expired,
    /// A certificate that our CA did not make, or none at all.
    Untrusted,
    /// The host was removed from the datastore.
    Removed,
    /// Bytes that are no frame of the protocol where they arrived.
    BadFrame,
    /// A frame longer than its kind allows.
    Oversize,
    /// More unfinished frames than a well-behaved peer can have.
    Flood,
    /// The peer took too long over its first frames.
    Timeout,
    /// The peer has our own identity: a copied host directory.
    SameIdentity,
    /// Another host answered at this address.
    WrongHost,
    /// Another connection of this pair of hosts is in use. No fault of anybody's.
    Duplicate,
    /// The pair's other end opened a newer connection. No fault of anybody's.
    Replaced,
    /// The daemon is stopping.
    Shutdown,
    /// Too many connections are being set up.
    Busy,
}

impl Refusal {
    /// Every reason, in the order of their close codes.
    pub const ALL: [Self; 15] = [
        Self::Shutdown,
        Self::Duplicate,
        Self::Replaced,
        Self::Version,
        Self::OtherDatastore,
        Self::Expired,
        Self::Untrusted,
        Self::Removed,
        Self::BadFrame,
        Self::Oversize,
        Self::Flood,
        Self::Timeout,
        Self::SameIdentity,
        Self::WrongHost,
        Self::Busy,
    ];

    /// The application close code on the wire.
    #[must_use]
    pub fn code(self) -> u32 {
        let at = Self::ALL.iter().position(|r| *r == self).expect("invariant: ALL lists every reason");
        u32::try_from(at).expect("invariant: fifteen reasons")
    }

    /// The reason of a close code, `None` for one of a later version.
    #[must_use]
    pub fn from_code(code: u64) -> Option<Self> {
        Self::ALL.get(usize::try_from(code).ok()?).copied()
    }

    /// A stable name for status and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Version => "version",
            Self::OtherDatastore => "other-datastore",
            Self::Expired => "expired-certificate",
            Self::Untrusted => "untrusted-certificate",
            Self::Removed => "removed-host",
            Self::BadFrame => "bad-frame",
            Self::Oversize => "oversize-frame",
            Self::Flood => "flood",
            Self::Timeout => "timeout",
            Self::SameIdentity => "same-identity",
            Self::WrongHost => "wrong-host",
            Self::Duplicate => "duplicate",
            Self::Replaced => "replaced",
            Self::Shutdown => "shutdown",
            Self::Busy => "busy",
        }
    }

    /// True for the everyday reasons, which are neither counted nor warned about.
    #[must_use]
    pub const fn is_routine(self) -> bool {
        matches!(self, Self::Duplicate | Self::Replaced | Self::Shutdown)
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Errors of the transport.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The UDP socket could not be had.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A certificate, key or invitation is not in order.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// rustls refused the configuration.
    #[error("TLS set-up: {0}")]
    Tls(#[from] rustls::Error),
    /// No entry for this host in the directory.
    #[error("no host {0} in this datastore")]
    UnknownHost(HostId),
    /// No connection to the host at the moment.
    #[error("not connected to host {0}")]
    NotConnected(HostId),
    /// The host's address has no usable meaning.
    #[error("cannot resolve {address}: {why}")]
    Resolve {
        /// The address as configured.
        address: String,
        /// What the resolver said.
        why: String,
    },
    /// A connection was refused, by us or by the peer.
    #[error("{peer}: {refusal}: {detail}")]
    Refused {
        /// Who, as far as known: a host's name or an address.
        peer: String,
        /// The class.
        refusal: Refusal,
        /// What exactly.
        detail: String,
    },
    /// The connection ended.
    #[error("connection lost: {0}")]
    Lost(String),
    /// The peer stopped reading this stream.
    #[error("the peer stopped reading the stream (code {0})")]
    Stopped(u64),
    /// The peer gave the stream up before its end.
    #[error("the peer gave up the stream (code {0})")]
    Reset(u64),
    /// A frame longer than allowed, on its way in or out.
    #[error("a frame of {len_bytes} bytes; {kind} frames have at most {max_bytes}")]
    Oversize {
        /// The kind of frame.
        kind: &'static str,
        /// Its claimed length.
        len_bytes: usize,
        /// The most that is allowed.
        max_bytes: usize,
    },
    /// Bytes that are no frame of the protocol.
    #[error("not a frame of the protocol: {0}")]
    BadFrame(String),
    /// A stream was used after a failure or a cancelled send in the middle of a frame.
    #[error("the stream broke off in the middle of a frame")]
    Broken,
    /// No answer in time.
    #[error("no answer within {0} ms")]
    Timeout(u64),
    /// The peer answered a request with a refusal.
    #[error("the peer declined: {0}")]
    Declined(String),
    /// The network was shut down.
    #[error("the network is shut down")]
    Shutdown,
}

impl NetError {
    /// The refusal to close the connection with after this error of reading from it, if the peer
    /// is to blame.
    #[must_use]
    pub const fn blame(&self) -> Option<Refusal> {
        match self {
            Self::Oversize { .. } => Some(Refusal::Oversize),
            Self::BadFrame(_) => Some(Refusal::BadFrame),
            Self::Refused { refusal, .. } => Some(*refusal),
            _ => None,
        }
    }

    /// What a read or write error of a stream means.
    pub(crate) fn from_read(e: quinn::ReadError) -> Self {
        match e {
            quinn::ReadError::Reset(code) => Self::Reset(code.into_inner()),
            quinn::ReadError::ConnectionLost(e) => Self::from_connection("peer", &e),
            other => Self::Lost(other.to_string()),
        }
    }

    pub(crate) fn from_write(e: quinn::WriteError) -> Self {
        match e {
            quinn::WriteError::Stopped(code) => Self::Stopped(code.into_inner()),
            quinn::WriteError::ConnectionLost(e) => Self::from_connection("peer", &e),
            other => Self::Lost(other.to_string()),
        }
    }

    /// What the end of a connection means: TLS alerts and our own close codes are typed.
    pub(crate) fn from_connection(peer: &str, e: &quinn::ConnectionError) -> Self {
        use quinn::ConnectionError as E;
        let refused = |refusal, detail: String| Self::Refused { peer: peer.to_owned(), refusal, detail };
        match e {
            E::ApplicationClosed(close) => match Refusal::from_code(close.error_code.into_inner()) {
                Some(r) => refused(r, format!("the peer says: {}", String::from_utf8_lossy(&close.reason))),
                None => Self::Lost(e.to_string()),
            },
            // rustls has the same alert for every other defect of a certificate.
            E::TransportError(t) if t.reason.contains("not valid for name") => {
                refused(Refusal::WrongHost, "another host answers at this address".into())
            }
            E::TransportError(t) => match alert_refusal(u64::from(t.code)) {
                Some(r) => refused(r, t.reason.clone()),
                None => Self::Lost(e.to_string()),
            },
            E::ConnectionClosed(c) => match alert_refusal(u64::from(c.error_code)) {
                Some(r) => refused(r, format!("the peer says: {}", alert_text(r))),
                None => Self::Lost(e.to_string()),
            },
            E::VersionMismatch => refused(Refusal::Version, "the peer speaks no QUIC version of ours".into()),
            _ => Self::Lost(e.to_string()),
        }
    }
}

/// TLS alerts (RFC 8446 section 6) arrive as QUIC error 0x100 + alert.
fn alert_refusal(code: u64) -> Option<Refusal> {
    match code.checked_sub(0x100)? {
        48 => Some(Refusal::OtherDatastore),
        45 => Some(Refusal::Expired),
        41 | 42 | 43 | 44 | 46 | 49 | 51 | 116 => Some(Refusal::Untrusted),
        120 | 70 => Some(Refusal::Version),
        _ => None,
    }
}

const fn alert_text(refusal: Refusal) -> &'static str {
    match refusal {
        Refusal::OtherDatastore => "your certificate is not from my datastore's CA",
        Refusal::Expired => "your certificate is outside of its validity",
        Refusal::Version => "no application protocol in common",
        _ => "your certificate is not accepted",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_close_code_has_one_reason_and_back() {
        for (i, r) in Refusal::ALL.into_iter().enumerate() {
            assert_eq!(usize::try_from(r.code()).unwrap(), i);
            assert_eq!(Refusal::from_code(u64::from(r.code())), Some(r));
        }
        assert_eq!(Refusal::from_code(99), None);
    }
}
