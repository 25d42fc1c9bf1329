//! Certificates and keys: the datastore's CA ([`CaKey`]), a host's identity ([`HostIdentity`]), and
//! the invitations that turn a stranger into a host ([`invite`]).
//!
//! Files of an identity directory:
//! ```text
//! ca.crt          certificate of the datastore's CA
//! ca.key          its private key, on enrolling hosts only            0600
//! host.crt        this host's certificate
//! host.key        this host's private key, never leaves the host      0600
//! hosts/ID.json   one file per known host (see `directory`)
//! removed/ID.json one file per removed host
//! invites/ID.json open and used invitations                           0600
//! ```

mod authority;
mod cert;
pub(crate) mod files;
mod identity;
pub mod invite;

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use vmfs_common::HostId;

pub use authority::{CaKey, Validity, init_datastore};
pub(crate) use cert::dns_name;
pub use cert::{CertInfo, Trust};
pub use identity::HostIdentity;

/// What is wrong with a key, a certificate or an invitation, and where.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file is there already.
    #[error("{path} exists already")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Others than the owner may read a secret.
    #[error("{path} has mode {mode:04o}: others can read it (chmod 600)")]
    OpenMode {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Not what it should be.
    #[error("{place}: {what}")]
    Malformed {
        /// A file, or where else it came from.
        place: String,
        /// What is wrong.
        what: String,
    },
    /// A certificate after its time.
    #[error("{place}: the certificate expired on {at}")]
    Expired {
        /// A file, or where else it came from.
        place: String,
        /// End of its validity.
        at: String,
    },
    /// A certificate before its time.
    #[error("{place}: the certificate is not valid before {at} (is the clock right?)")]
    NotYetValid {
        /// A file, or where else it came from.
        place: String,
        /// Start of its validity.
        at: String,
    },
    /// Key and certificate are not a pair.
    #[error("{key} is not the key of {certificate}")]
    KeyMismatch {
        /// The key's file.
        key: PathBuf,
        /// The certificate's file.
        certificate: PathBuf,
    },
    /// A certificate that the datastore's CA did not make.
    #[error("{place}: not signed by the CA of datastore {datastore}")]
    OtherDatastore {
        /// A file, or where else it came from.
        place: String,
        /// Our datastore.
        datastore: String,
    },
    /// Something needs the CA's private key, which is on another host.
    #[error("{path} is not on this host: invite and remove hosts where it is")]
    NoCaKey {
        /// Where it would be.
        path: PathBuf,
    },
    /// Not a name for a host.
    #[error(
        "{0:?} is no host name: 1 to 63 letters, digits, '-', '_' or '.', starting with a letter or digit"
    )]
    Name(String),
    /// Two hosts cannot have one name.
    #[error("there is a host {name} already ({host})")]
    NameTaken {
        /// The name.
        name: String,
        /// Who has it.
        host: HostId,
    },
    /// Text that is no invitation.
    #[error("not an invitation: {0}")]
    Token(String),
    /// The invitation's time is over.
    #[error("the invitation expired on {0}")]
    InviteExpired(String),
    /// The invitation has served.
    #[error("the invitation has been used already")]
    InviteUsed,
    /// The inviting host does not know the invitation.
    #[error("the inviting host knows no such invitation")]
    InviteUnknown,
    /// The secret of the invitation was not proven.
    #[error("the proof of the invitation's secret is wrong")]
    Proof,
    /// The host was removed.
    #[error("host {0} was removed from this datastore")]
    Removed(HostId),
    /// A host cannot remove itself.
    #[error("host {0} is this host itself: remove it from another one that has the CA's key")]
    OwnHost(HostId),
    /// The certificate could not be made.
    #[error("cannot make a certificate: {0}")]
    Issue(#[from] rcgen::Error),
    /// The kernel gave no random bytes.
    #[error("no random bytes: {0}")]
    Random(getrandom::Error),
}

impl PkiError {
    pub(crate) fn malformed(place: impl ToString, what: impl ToString) -> Self {
        Self::Malformed { place: place.to_string(), what: what.to_string() }
    }
}

/// `N` random bytes.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], PkiError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(PkiError::Random)?;
    Ok(bytes)
}

/// Milliseconds since 1970; 0 for a clock before that.
pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A point in time for people, in UTC.
pub(crate) fn show_time(unix_s: i64) -> String {
    use time::format_description::well_known::Rfc3339;
    time::OffsetDateTime::from_unix_timestamp(unix_s)
        .ok()
        .and_then(|t| t.format(&Rfc3339).ok())
        .unwrap_or_else(|| format!("{unix_s} s after 1970"))
}

/// Checks a host's name.
///
/// # Errors
/// [`PkiError::Name`].
pub fn check_name(name: &str) -> Result<(), PkiError> {
    let fits = (1..=63).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    if fits { Ok(()) } else { Err(PkiError::Name(name.chars().take(80).collect())) }
}
