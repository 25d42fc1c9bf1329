//! A host's identity: its key, its certificate and the CA it trusts.

use std::path::{Path, PathBuf};

use rustls::pki_types::CertificateDer;
use vmfs_common::identity::HostKey;
use vmfs_common::{DatastoreId, HostId};
use zeroize::Zeroizing;

use super::authority::now_s;
use super::cert::{CertInfo, Trust};
use super::files::{self, Mode};
use super::{PkiError, random};

const CERT_TAG: &str = "CERTIFICATE";
const KEY_TAG: &str = "PRIVATE KEY";

/// Everything that makes a host a member of its datastore, checked to fit together.
#[derive(Debug, Clone)]
pub struct HostIdentity {
    dir: PathBuf,
    key: HostKey,
    certificate: CertificateDer<'static>,
    info: CertInfo,
    trust: Trust,
}

impl HostIdentity {
    /// Reads and checks `ca.crt`, `host.crt` and `host.key` in `dir`.
    ///
    /// # Errors
    /// One clear line with the file: unreadable, not what it should be, expired or not yet valid,
    /// a key of another certificate, a certificate of another datastore, a key that others can read.
    pub fn load(dir: &Path) -> Result<Self, PkiError> {
        let trust = load_trust(dir)?;
        let (cert_path, key_path) = (dir.join("host.crt"), dir.join("host.key"));
        let certificate = load_cert(&cert_path)?;
        let info = trust.check_host(&certificate, now_s(), &cert_path.display())?;
        let key = load_key(&key_path)?;
        if key.public() != info.public_key {
            return Err(PkiError::KeyMismatch { key: key_path, certificate: cert_path });
        }
        Ok(Self { dir: dir.to_owned(), key, certificate, info, trust })
    }

    /// The identity directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// This host.
    #[must_use]
    pub const fn host(&self) -> HostId {
        self.info.host
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.info.name
    }

    /// Its datastore.
    #[must_use]
    pub const fn datastore(&self) -> DatastoreId {
        self.info.datastore
    }

    /// Its private key.
    #[must_use]
    pub const fn key(&self) -> &HostKey {
        &self.key
    }

    /// Its certificate.
    #[must_use]
    pub const fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// What the certificate says.
    #[must_use]
    pub const fn info(&self) -> &CertInfo {
        &self.info
    }

    /// The CA it trusts.
    #[must_use]
    pub const fn trust(&self) -> &Trust {
        &self.trust
    }
}

/// Reads `ca.crt` and checks its dates.
pub(super) fn load_trust(dir: &Path) -> Result<Trust, PkiError> {
    let path = dir.join("ca.crt");
    let trust = Trust::new(load_cert(&path)?, &path.display())?;
    trust.ca_info().check_dates(now_s(), &path.display())?;
    Ok(trust)
}

/// The host's key in `dir`: the one that is there (a join that was interrupted), else a new one.
pub(super) fn load_or_make_key(dir: &Path) -> Result<HostKey, PkiError> {
    files::make_dir(dir)?;
    let path = dir.join("host.key");
    if path.exists() {
        return load_key(&path);
    }
    let key = HostKey::from_seed(random()?);
    write_key(&path, &key)?;
    Ok(key)
}

/// Writes the two certificates of a host that has just been admitted.
pub(super) fn write_certs(
    dir: &Path,
    host: &CertificateDer<'_>,
    ca: &CertificateDer<'_>,
) -> Result<(), PkiError> {
    let ca_path = dir.join("ca.crt");
    if ca_path.exists() {
        if load_cert(&ca_path)? != *ca {
            return Err(PkiError::malformed(
                ca_path.display(),
                "this directory belongs to another datastore",
            ));
        }
    } else {
        files::create(&ca_path, Mode::Public, cert_pem(ca).as_bytes())?;
    }
    files::create(&dir.join("host.crt"), Mode::Public, cert_pem(host).as_bytes())
}

fn load_cert(path: &Path) -> Result<CertificateDer<'static>, PkiError> {
    let text = files::read(path)?;
    let doc = pem::parse(text).map_err(|e| PkiError::malformed(path.display(), format!("not PEM: {e}")))?;
    if doc.tag() != CERT_TAG {
        return Err(PkiError::malformed(path.display(), format!("{} where {CERT_TAG} is due", doc.tag())));
    }
    Ok(CertificateDer::from(doc.into_contents()))
}

pub(super) fn load_key(path: &Path) -> Result<HostKey, PkiError> {
    let text = files::read_secret(path)?;
    let doc = pem::parse(&text[..]).map_err(|_| PkiError::malformed(path.display(), "not PEM"))?;
    if doc.tag() != KEY_TAG {
        return Err(PkiError::malformed(path.display(), format!("{} where {KEY_TAG} is due", doc.tag())));
    }
    let der = Zeroizing::new(doc.into_contents());
    HostKey::from_pkcs8_der(&der).map_err(|e| PkiError::malformed(path.display(), e))
}

pub(super) fn write_key(path: &Path, key: &HostKey) -> Result<(), PkiError> {
    let pem = pem::Pem::new(KEY_TAG, key.to_pkcs8_der().to_vec());
    let text = Zeroizing::new(pem::encode(&pem));
    drop(Zeroizing::new(pem.into_contents()));
    files::create(path, Mode::Secret, text.as_bytes())
}

pub(super) fn cert_pem(cert: &CertificateDer<'_>) -> String {
    pem::encode(&pem::Pem::new(CERT_TAG, cert.to_vec()))
}
