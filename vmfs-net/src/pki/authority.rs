//! The datastore's CA: its key, and the certificates it makes.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType, SubjectPublicKeyInfo,
};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use vmfs_common::DatastoreId;
use vmfs_common::identity::{HostKey, PublicKey, Signature};

use super::cert::{Trust, dns_name, uri};
use super::files::{self, Mode};
use super::{PkiError, random, unix_ms};

const DAY_S: i64 = 24 * 3600;
/// Clocks of hosts may be this far behind the enrolling host's.
const SKEW_S: i64 = 3600;
const CA_DAYS: i64 = 30 * 365;
const HOST_DAYS: i64 = 10 * 365;

/// First bytes of an Ed25519 SubjectPublicKeyInfo (RFC 8410); the key's 32 bytes follow.
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// When a certificate is valid, in seconds since 1970, ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// Start.
    pub not_before_s: i64,
    /// End.
    pub not_after_s: i64,
}

impl Validity {
    /// From an hour ago until `days` from now.
    #[must_use]
    pub fn days(days: i64) -> Self {
        let now = now_s();
        Self { not_before_s: now - SKEW_S, not_after_s: now + days * DAY_S }
    }

    fn apply(self, params: &mut CertificateParams) -> Result<(), PkiError> {
        let at =
            |s| time::OffsetDateTime::from_unix_timestamp(s).map_err(|e| PkiError::malformed("validity", e));
        params.not_before = at(self.not_before_s)?;
        params.not_after = at(self.not_after_s)?;
        Ok(())
    }
}

/// Seconds since 1970.
pub(crate) fn now_s() -> i64 {
    i64::try_from(unix_ms() / 1000).unwrap_or(i64::MAX)
}

/// The CA's private key together with its certificate.
#[derive(Debug)]
pub struct CaKey {
    key: HostKey,
    trust: Trust,
}

impl CaKey {
    /// Reads `ca.key` and `ca.crt` of an identity directory.
    ///
    /// # Errors
    /// [`PkiError::NoCaKey`] when this host is not an enrolling one, else what is wrong with which file.
    pub fn load(dir: &Path) -> Result<Self, PkiError> {
        let (key_path, cert_path) = (dir.join("ca.key"), dir.join("ca.crt"));
        if !key_path.exists() {
            return Err(PkiError::NoCaKey { path: key_path });
        }
        let trust = super::identity::load_trust(dir)?;
        let key = super::identity::load_key(&key_path)?;
        if key.public() != trust.ca_info().public_key {
            return Err(PkiError::KeyMismatch { key: key_path, certificate: cert_path });
        }
        Ok(Self { key, trust })
    }

    /// The CA's certificate as a judge.
    #[must_use]
    pub const fn trust(&self) -> &Trust {
        &self.trust
    }

    /// Makes the certificate of the host `name` with the key `public_key`.
    ///
    /// # Errors
    /// [`PkiError::Name`], [`PkiError::Issue`].
    pub fn issue(
        &self,
        public_key: &PublicKey,
        name: &str,
        validity: Validity,
    ) -> Result<CertificateDer<'static>, PkiError> {
        super::check_name(name)?;
        let host = public_key.host_id();
        let mut params = CertificateParams::new(vec![dns_name(host)])?;
        let datastore = self.trust.datastore();
        params.subject_alt_names.push(SanType::URI(uri(datastore, Some(host)).try_into()?));
        params.distinguished_name = common_name(name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial()?);
        validity.apply(&mut params)?;
        let issuer = Issuer::from_ca_cert_der(self.trust.ca(), key_pair(&self.key)?)?;
        let spki = SubjectPublicKeyInfo::from_der(&[&SPKI_PREFIX[..], &public_key.0].concat())?;
        Ok(params.signed_by(&spki, &issuer)?.into())
    }

    /// [`Self::issue`] with the ten years that hosts get.
    pub(crate) fn issue_host(
        &self,
        key: &PublicKey,
        name: &str,
    ) -> Result<CertificateDer<'static>, PkiError> {
        self.issue(key, name, Validity::days(HOST_DAYS))
    }

    /// Signs with the CA's key.
    pub(crate) fn sign(&self, label: &str, msg: &[u8]) -> Signature {
        self.key.sign(label, msg)
    }
}

/// Makes a datastore: a CA with a new key in `dir` (created when missing). On return both files are
/// on stable storage.
///
/// # Errors
/// [`PkiError::Exists`] when `dir` belongs to a datastore already; else what could not be done.
pub fn init_datastore(dir: &Path) -> Result<DatastoreId, PkiError> {
    let (key_path, cert_path) = (dir.join("ca.key"), dir.join("ca.crt"));
    for path in [&cert_path, &key_path] {
        if path.exists() {
            return Err(PkiError::Exists { path: path.clone() });
        }
    }
    files::make_dir(dir)?;
    let datastore = DatastoreId::from_bytes(random()?);
    let key = HostKey::from_seed(random()?);
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(&format!("vmfs datastore {datastore}"));
    params.subject_alt_names = vec![SanType::URI(uri(datastore, None).try_into()?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(serial()?);
    Validity::days(CA_DAYS).apply(&mut params)?;
    let cert: CertificateDer<'static> = params.self_signed(&key_pair(&key)?)?.into();
    super::identity::write_key(&key_path, &key)?;
    files::create(&cert_path, Mode::Public, super::identity::cert_pem(&cert).as_bytes())?;
    Ok(datastore)
}

/// A host's key as rcgen takes it.
pub(crate) fn key_pair(key: &HostKey) -> Result<KeyPair, PkiError> {
    let der = key.to_pkcs8_der();
    let pkcs8 = PrivatePkcs8KeyDer::from(&der[..]);
    Ok(KeyPair::from_pkcs8_der_and_sign_algo(&pkcs8, &rcgen::PKCS_ED25519)?)
}

fn common_name(name: &str) -> DistinguishedName {
    let mut dn = DistinguishedName::new();
    dn.push(DnType::CommonName, name);
    dn
}

/// A random positive serial number.
fn serial() -> Result<rcgen::SerialNumber, PkiError> {
    let mut bytes = random::<16>()?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(rcgen::SerialNumber::from_slice(&bytes))
}
