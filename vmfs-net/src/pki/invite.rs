//! Invitations: how a stranger becomes a host.
//!
//! The enrolling host (the one with the CA's key) makes an invitation for a name: a file
//! `invites/ID.json` there, and a token that the operator carries to the new host. The new host makes
//! its key, connects to the enrolling host (which it knows by the CA's fingerprint in the token), and
//! sends a certificate request with a proof that it holds the token's secret: an HMAC over the TLS
//! session, so that the proof is worth nothing elsewhere. Before the certificate leaves, the
//! invitation is bound to the new host's key, durably; the same host may repeat a join whose answer
//! was lost, nobody else can use it again.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use hmac::{Hmac, KeyInit as _, Mac as _};
use rcgen::{CertificateParams, CertificateSigningRequestParams};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use vmfs_common::identity::{HostKey, PublicKey};
use vmfs_common::ids::{hex_decode, hex_encode};
use vmfs_common::{DatastoreId, HostId};
use zeroize::{Zeroize as _, Zeroizing};

use super::authority::{CaKey, key_pair, now_s};
use super::cert::Trust;
use super::files::{self, Mode};
use super::{HostIdentity, PkiError, check_name, identity, random, show_time, unix_ms};
use crate::directory::{Announcement, Directory, Gossip, HostRole, check_address};
use crate::tls;

const TOKEN_PREFIX: &str = "vmfs1-invite-";
const PROOF_LABEL: &[u8] = b"vmfs1/enrol-proof";
/// Length of an invitation's fixed part; the address follows.
const FIXED_BYTES: usize = 16 + 32 + 16 + 8 + 32 + 8;
/// Used and expired invitations are forgotten after this long.
const KEEP_S: u64 = 7 * 24 * 3600;
/// The longest time an invitation may be valid.
pub const INVITE_TTL_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// What the token says. Its `Display` is the token itself, which is a secret.
pub struct Invitation {
    datastore: DatastoreId,
    ca_fingerprint: [u8; 32],
    inviter: HostId,
    id: [u8; 8],
    secret: Zeroizing<[u8; 32]>,
    expires_s: u64,
    address: String,
}

impl fmt::Debug for Invitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invitation")
            .field("id", &hex_encode(&self.id))
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Invitation {
    /// The datastore that it leads to.
    #[must_use]
    pub const fn datastore(&self) -> DatastoreId {
        self.datastore
    }

    /// Where to enrol.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The enrolling host.
    #[must_use]
    pub const fn inviter(&self) -> HostId {
        self.inviter
    }

    /// End of its validity, in seconds since 1970.
    #[must_use]
    pub const fn expires_s(&self) -> u64 {
        self.expires_s
    }

    pub(crate) const fn ca_fingerprint(&self) -> [u8; 32] {
        self.ca_fingerprint
    }

    /// Reads a token, or a file that contains one.
    ///
    /// # Errors
    /// [`PkiError::Token`], or why the file cannot be read.
    pub fn from_token_or_file(text: &str) -> Result<Self, PkiError> {
        if text.trim_start().starts_with(TOKEN_PREFIX) {
            return text.parse();
        }
        let path = Path::new(text);
        let content = Zeroizing::new(files::read(path)?);
        let content = std::str::from_utf8(&content).map_err(|_| PkiError::malformed(text, "not text"))?;
        content.parse().map_err(|e| PkiError::malformed(text, e))
    }

    /// Writes the token to a new file with mode 0600.
    ///
    /// # Errors
    /// When there is such a file already, or it cannot be written.
    pub fn write_to(&self, path: &Path) -> Result<(), PkiError> {
        let text = Zeroizing::new(format!("{self}\n"));
        files::create(path, Mode::Secret, text.as_bytes())
    }

    fn check_time(&self) -> Result<(), PkiError> {
        check_expiry(self.expires_s)
    }
}

fn check_expiry(expires_s: u64) -> Result<(), PkiError> {
    if unix_ms() / 1000 < expires_s {
        return Ok(());
    }
    Err(PkiError::InviteExpired(show_time(i64::try_from(expires_s).unwrap_or(i64::MAX))))
}

impl fmt::Display for Invitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = Zeroizing::new(Vec::with_capacity(FIXED_BYTES + self.address.len() + 4));
        bytes.extend_from_slice(self.datastore.as_bytes());
        bytes.extend_from_slice(&self.ca_fingerprint);
        bytes.extend_from_slice(self.inviter.as_bytes());
        bytes.extend_from_slice(&self.id);
        bytes.extend_from_slice(&self.secret[..]);
        bytes.extend_from_slice(&self.expires_s.to_le_bytes());
        bytes.extend_from_slice(self.address.as_bytes());
        let sum = Sha256::digest(&bytes[..]);
        bytes.extend_from_slice(&sum[..4]);
        write!(f, "{TOKEN_PREFIX}{}", hex_encode(&bytes))
    }
}

impl FromStr for Invitation {
    type Err = PkiError;

    fn from_str(text: &str) -> Result<Self, PkiError> {
        let bad = |what: &str| PkiError::Token(what.to_owned());
        let hex = text.trim().strip_prefix(TOKEN_PREFIX).ok_or_else(|| bad("it starts differently"))?;
        let bytes = Zeroizing::new(hex_decode(hex).ok_or_else(|| bad("not hexadecimal"))?);
        if bytes.len() < FIXED_BYTES + 4 {
            return Err(bad("cut off"));
        }
        let (body, sum) = bytes.split_at(bytes.len() - 4);
        if Sha256::digest(body)[..4] != *sum {
            return Err(bad("the checksum is wrong: cut off or mistyped"));
        }
        let mut rest = body;
        let address =
            std::str::from_utf8(&body[FIXED_BYTES..]).map_err(|_| bad("the address is not text"))?;
        check_address(address).map_err(|e| bad(&e))?;
        Ok(Self {
            datastore: DatastoreId::from_bytes(take(&mut rest)),
            ca_fingerprint: take(&mut rest),
            inviter: HostId::from_bytes(take(&mut rest)),
            id: take(&mut rest),
            secret: Zeroizing::new(take(&mut rest)),
            expires_s: u64::from_le_bytes(take(&mut rest)),
            address: address.to_owned(),
        })
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (head, tail) = rest.split_first_chunk().expect("invariant: the length was checked above");
    *rest = tail;
    *head
}

/// An invitation in the enrolling host's directory.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct InviteFile {
    name: String,
    secret: String,
    expires_s: u64,
    /// The key that has used it.
    used_by: Option<PublicKey>,
    /// The certificate that was made then.
    certificate: Option<String>,
}

impl Drop for InviteFile {
    fn drop(&mut self) {
        self.secret.zeroize();
    }
}

fn invite_path(dir: &Path, id: &str) -> PathBuf {
    dir.join("invites").join(format!("{id}.json"))
}

/// Makes an invitation for the host `name`, good for `ttl` (at most [`INVITE_TTL_MAX`]) and for one
/// host. `address` is where this host listens; on return the invitation is on stable storage.
///
/// # Errors
/// [`PkiError::NoCaKey`], [`PkiError::Name`], [`PkiError::NameTaken`], or what could not be written.
pub fn create(
    identity: &HostIdentity,
    directory: &Directory,
    name: &str,
    address: &str,
    ttl: Duration,
) -> Result<Invitation, PkiError> {
    let ca = CaKey::load(identity.dir())?;
    make(&ca, identity.dir(), directory, identity.host(), name, address, ttl)
}

fn make(
    ca: &CaKey,
    dir: &Path,
    directory: &Directory,
    inviter: HostId,
    name: &str,
    address: &str,
    ttl: Duration,
) -> Result<Invitation, PkiError> {
    check_name(name)?;
    check_address(address).map_err(|what| PkiError::malformed("address of the enrolment endpoint", what))?;
    if let Some(known) = directory.by_name(name) {
        return Err(PkiError::NameTaken { name: name.to_owned(), host: known.host });
    }
    forget_old(dir)?;
    let invitation = Invitation {
        datastore: ca.trust().datastore(),
        ca_fingerprint: tls::fingerprint(ca.trust().ca()),
        inviter,
        id: random()?,
        secret: Zeroizing::new(random()?),
        expires_s: unix_ms() / 1000 + ttl.min(INVITE_TTL_MAX).as_secs(),
        address: address.to_owned(),
    };
    let file = InviteFile {
        name: name.to_owned(),
        secret: hex_encode(&invitation.secret[..]),
        expires_s: invitation.expires_s,
        used_by: None,
        certificate: None,
    };
    files::make_dir(&dir.join("invites"))?;
    let bytes = to_json(&file);
    files::create(&invite_path(dir, &hex_encode(&invitation.id)), Mode::Secret, &bytes)?;
    Ok(invitation)
}

fn to_json(file: &InviteFile) -> Zeroizing<Vec<u8>> {
    Zeroizing::new(serde_json::to_vec(file).expect("invariant: a plain struct of strings and numbers"))
}

fn read_invite(path: &Path) -> Result<InviteFile, PkiError> {
    let bytes = files::read_secret(path)?;
    serde_json::from_slice(&bytes).map_err(|e| PkiError::malformed(path.display(), e))
}

fn forget_old(dir: &Path) -> Result<(), PkiError> {
    for path in files::list(&dir.join("invites"), "json")? {
        let invite = read_invite(&path)?;
        if invite.expires_s.saturating_add(KEEP_S) < unix_ms() / 1000 {
            files::remove(&path)?;
        }
    }
    Ok(())
}

/// What a joining host sends.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct JoinRequest {
    invite: String,
    csr: String,
    proof: String,
    announcement: Announcement,
}

/// What it gets.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Admission {
    certificate: String,
    hosts: Gossip,
}

fn proof(secret: &[u8], binding: &[u8; 32], invite: &str, csr: &[u8]) -> Hmac<Sha256> {
    let mut mac = <Hmac<Sha256>>::new_from_slice(secret).expect("invariant: HMAC takes keys of any length");
    mac.update(PROOF_LABEL);
    mac.update(binding);
    mac.update(&[u8::try_from(invite.len()).unwrap_or(u8::MAX)]);
    mac.update(invite.as_bytes());
    mac.update(csr);
    mac
}

/// The joining side, first half: its key (made now, or left from an interrupted join) and what to
/// send. `binding` identifies the TLS session.
pub(crate) fn request(
    dir: &Path,
    invitation: &Invitation,
    binding: &[u8; 32],
    address: &str,
    roles: &[HostRole],
) -> Result<(HostKey, JoinRequest), PkiError> {
    prepare(dir, invitation)?;
    check_address(address).map_err(|what| PkiError::malformed("address of this host", what))?;
    let key = identity::load_or_make_key(dir)?;
    let csr = CertificateParams::default().serialize_request(&key_pair(&key)?)?;
    let invite = hex_encode(&invitation.id);
    let mac = proof(&invitation.secret[..], binding, &invite, csr.der());
    let announcement = Announcement::sign(invitation.datastore, &key, address, roles, unix_ms());
    let request = JoinRequest {
        proof: hex_encode(&mac.finalize().into_bytes()),
        csr: hex_encode(csr.der()),
        invite,
        announcement,
    };
    Ok((key, request))
}

/// What must hold before a host tries to join: an invitation in time, a directory of no other host.
pub(crate) fn prepare(dir: &Path, invitation: &Invitation) -> Result<(), PkiError> {
    invitation.check_time()?;
    let cert = dir.join("host.crt");
    if cert.exists() { Err(PkiError::Exists { path: cert }) } else { Ok(()) }
}

/// The enrolling side: checks a request, burns the invitation, makes the certificate. Calls for one
/// directory must not overlap.
pub(crate) fn admit(
    dir: &Path,
    directory: &Directory,
    request: JoinRequest,
    binding: &[u8; 32],
) -> Result<Admission, PkiError> {
    let ca = CaKey::load(dir)?;
    if hex_decode(&request.invite).is_none_or(|id| id.len() != 8) {
        return Err(PkiError::InviteUnknown);
    }
    let path = invite_path(dir, &request.invite);
    if !path.exists() {
        return Err(PkiError::InviteUnknown);
    }
    let mut invite = read_invite(&path)?;
    let csr = hex_decode(&request.csr).ok_or_else(|| PkiError::malformed("request", "not hexadecimal"))?;
    let secret = Zeroizing::new(hex_decode(&invite.secret).unwrap_or_default());
    let given = hex_decode(&request.proof).unwrap_or_default();
    if secret.len() != 32 || proof(&secret, binding, &request.invite, &csr).verify_slice(&given).is_err() {
        return Err(PkiError::Proof);
    }
    check_expiry(invite.expires_s)?;
    let public_key = requested_key(csr)?;
    if directory.is_removed(public_key.host_id()) {
        return Err(PkiError::Removed(public_key.host_id()));
    }
    let certificate = match (&invite.used_by, &invite.certificate) {
        (Some(key), Some(cert)) if *key == public_key => {
            hex_decode(cert).ok_or_else(|| PkiError::malformed(path.display(), "certificate"))?.into()
        }
        (None, None) => {
            if let Some(known) = directory.by_name(&invite.name) {
                return Err(PkiError::NameTaken { name: invite.name.clone(), host: known.host });
            }
            let certificate = ca.issue_host(&public_key, &invite.name)?;
            invite.used_by = Some(public_key);
            invite.certificate = Some(hex_encode(&certificate));
            files::replace(&path, Mode::Secret, &to_json(&invite))?;
            certificate
        }
        _ => return Err(PkiError::InviteUsed),
    };
    let entry = request.announcement.into_entry(ca.trust(), certificate.clone(), "request")?;
    directory.put(entry)?;
    Ok(Admission { certificate: hex_encode(&certificate), hosts: directory.gossip() })
}

/// The key that a certificate request is about; the request proves possession of it. Nothing else in
/// it counts: the name comes from the invitation.
fn requested_key(csr: Vec<u8>) -> Result<PublicKey, PkiError> {
    use rcgen::PublicKeyData as _;
    let csr = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr))?;
    let raw = <[u8; 32]>::try_from(csr.public_key.der_bytes()).ok();
    raw.filter(|_| csr.public_key.algorithm() == &rcgen::PKCS_ED25519)
        .map(PublicKey)
        .ok_or_else(|| PkiError::malformed("request", "not an Ed25519 key"))
}

/// The joining side, second half: checks what came back and writes it. On return the host is one.
pub(crate) fn complete(
    dir: &Path,
    invitation: &Invitation,
    key: &HostKey,
    ca: &CertificateDer<'static>,
    admission: Admission,
) -> Result<HostIdentity, PkiError> {
    let place = "answer of the enrolling host";
    let trust = Trust::new(ca.clone(), &place)?;
    if trust.datastore() != invitation.datastore || tls::fingerprint(ca) != invitation.ca_fingerprint {
        return Err(PkiError::OtherDatastore {
            place: place.into(),
            datastore: invitation.datastore.to_string(),
        });
    }
    let der =
        hex_decode(&admission.certificate).ok_or_else(|| PkiError::malformed(place, "not hexadecimal"))?;
    let certificate = CertificateDer::from(der);
    let info = trust.check_host(&certificate, now_s(), &place)?;
    if info.public_key != key.public() {
        return Err(PkiError::malformed(place, "a certificate for another key"));
    }
    // The entries first: the certificate is what makes the directory a host's.
    let directory = Directory::open(dir, &trust)?;
    for problem in directory.merge(admission.hosts, "the enrolling host")? {
        tracing::warn!("{problem}");
    }
    identity::write_certs(dir, &certificate, ca)?;
    HostIdentity::load(dir)
}

/// Enrols a host whose directory is on this machine, without the network: the first host of a
/// datastore (`host_dir == ca_dir`), or the hosts of `vmfs up`. Everything else is as in a join.
///
/// # Errors
/// As for an invitation and a join.
pub fn join_local(
    ca_dir: &Path,
    name: &str,
    host_dir: &Path,
    address: &str,
    roles: &[HostRole],
) -> Result<HostIdentity, PkiError> {
    let ca = CaKey::load(ca_dir)?;
    let directory = Directory::open(ca_dir, ca.trust())?;
    let ttl = Duration::from_secs(60);
    let invitation = make(&ca, ca_dir, &directory, HostId::default(), name, address, ttl)?;
    let binding = [0; 32];
    let (key, request) = request(host_dir, &invitation, &binding, address, roles)?;
    let admission = admit(ca_dir, &directory, request, &binding)?;
    complete(host_dir, &invitation, &key, ca.trust().ca(), admission)
}
