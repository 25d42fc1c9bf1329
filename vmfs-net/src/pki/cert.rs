//! Reading and judging certificates.

use std::fmt;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, RootCertStore};
use vmfs_common::identity::PublicKey;
use vmfs_common::{DatastoreId, HostId};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::X509Certificate;

use super::{PkiError, show_time};
use crate::tls;

/// Scheme of the names in certificates: `vmfs://DATASTORE` in the CA's, `vmfs://DATASTORE/HOST` in
/// a host's.
const SCHEME: &str = "vmfs://";

/// The name that TLS knows a host by.
pub(crate) fn tls_name(host: HostId) -> ServerName<'static> {
    let name = dns_name(host);
    ServerName::try_from(name).expect("invariant: hexadecimal digits and a suffix are a DNS name")
}

/// The same as text.
pub(crate) fn dns_name(host: HostId) -> String {
    format!("{host}.vmfs")
}

/// The URI of a CA or (with `host`) of a host.
pub(crate) fn uri(datastore: DatastoreId, host: Option<HostId>) -> String {
    match host {
        Some(host) => format!("{SCHEME}{datastore}/{host}"),
        None => format!("{SCHEME}{datastore}"),
    }
}

/// What a certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertInfo {
    /// The datastore.
    pub datastore: DatastoreId,
    /// The host; for a CA the id that follows from its key.
    pub host: HostId,
    /// The host's name.
    pub name: String,
    /// The key that is certified.
    pub public_key: PublicKey,
    /// Whether it is a CA's.
    pub is_ca: bool,
    /// Start of its validity, in seconds since 1970.
    pub not_before_s: i64,
    /// End of its validity, in seconds since 1970.
    pub not_after_s: i64,
}

impl CertInfo {
    /// Reads a certificate (DER); says nothing about who signed it. `place` is for the error.
    ///
    /// # Errors
    /// [`PkiError::Malformed`].
    pub fn parse(der: &[u8], place: &impl fmt::Display) -> Result<Self, PkiError> {
        let bad = |what: &str| PkiError::malformed(place, what);
        let (rest, cert) =
            x509_parser::parse_x509_certificate(der).map_err(|_| bad("not an X.509 certificate"))?;
        if !rest.is_empty() {
            return Err(bad("bytes after the certificate"));
        }
        let spki = cert.public_key();
        if spki.algorithm.algorithm != x509_parser::oid_registry::OID_SIG_ED25519 {
            return Err(bad("not the certificate of an Ed25519 key"));
        }
        let key = <[u8; 32]>::try_from(&*spki.subject_public_key.data);
        let public_key = PublicKey(key.map_err(|_| bad("not an Ed25519 key of 32 bytes"))?);
        let name = cert.subject().iter_common_name().next().and_then(|cn| cn.as_str().ok());
        let name = name.ok_or_else(|| bad("no common name"))?.to_owned();
        let uri = vmfs_uri(&cert).ok_or_else(|| bad("not a certificate of VMFS"))?;
        let (datastore, host) = match uri.split_once('/') {
            Some((d, h)) => (d.parse(), Some(h.parse::<HostId>())),
            None => (uri.parse(), None),
        };
        let datastore = datastore.map_err(|_| bad("no datastore id"))?;
        if host.is_some_and(|h| h.ok() != Some(public_key.host_id())) {
            return Err(bad("the host id does not follow from the key"));
        }
        Ok(Self {
            datastore,
            host: public_key.host_id(),
            name,
            public_key,
            is_ca: cert.is_ca(),
            not_before_s: cert.validity().not_before.timestamp(),
            not_after_s: cert.validity().not_after.timestamp(),
        })
    }

    /// Checks the validity at `now_s`.
    ///
    /// # Errors
    /// [`PkiError::Expired`], [`PkiError::NotYetValid`].
    pub fn check_dates(&self, now_s: i64, place: &impl fmt::Display) -> Result<(), PkiError> {
        let place = place.to_string();
        if now_s > self.not_after_s {
            return Err(PkiError::Expired { place, at: show_time(self.not_after_s) });
        }
        if now_s < self.not_before_s {
            return Err(PkiError::NotYetValid { place, at: show_time(self.not_before_s) });
        }
        Ok(())
    }
}

fn vmfs_uri<'a>(cert: &'a X509Certificate<'_>) -> Option<&'a str> {
    let names = cert.subject_alternative_name().ok()??;
    names.value.general_names.iter().find_map(|n| match n {
        GeneralName::URI(uri) => uri.strip_prefix(SCHEME),
        _ => None,
    })
}

/// The datastore's CA as the judge of certificates.
#[derive(Clone)]
pub struct Trust {
    ca: CertificateDer<'static>,
    info: CertInfo,
    verifier: Arc<WebPkiServerVerifier>,
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trust").field("datastore", &self.info.datastore).finish_non_exhaustive()
    }
}

impl Trust {
    /// Trusts exactly this CA certificate.
    ///
    /// # Errors
    /// [`PkiError::Malformed`] when it is not a CA's.
    pub fn new(ca: CertificateDer<'static>, place: &impl fmt::Display) -> Result<Self, PkiError> {
        let info = CertInfo::parse(&ca, place)?;
        if !info.is_ca {
            return Err(PkiError::malformed(place, "not a CA's certificate"));
        }
        let roots = roots(&ca).map_err(|e| PkiError::malformed(place, e))?;
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, tls::provider(true))
            .build()
            .map_err(|e| PkiError::malformed(place, e))?;
        Ok(Self { ca, info, verifier })
    }

    /// The CA's certificate.
    #[must_use]
    pub const fn ca(&self) -> &CertificateDer<'static> {
        &self.ca
    }

    /// What the CA's certificate says.
    #[must_use]
    pub const fn ca_info(&self) -> &CertInfo {
        &self.info
    }

    /// The datastore of this CA.
    #[must_use]
    pub const fn datastore(&self) -> DatastoreId {
        self.info.datastore
    }

    /// Checks that `cert` is a host's, signed by this CA and valid at `now_s`; says what it contains.
    ///
    /// # Errors
    /// One of [`PkiError`]'s variants about certificates, naming `place`.
    pub fn check_host(
        &self,
        cert: &CertificateDer<'_>,
        now_s: i64,
        place: &impl fmt::Display,
    ) -> Result<CertInfo, PkiError> {
        let info = CertInfo::parse(cert, place)?;
        let other = || PkiError::OtherDatastore {
            place: place.to_string(),
            datastore: self.info.datastore.to_string(),
        };
        if info.is_ca {
            return Err(PkiError::malformed(place, "a CA's certificate where a host's is due"));
        }
        if info.datastore != self.info.datastore {
            return Err(other());
        }
        info.check_dates(now_s, place)?;
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(now_s.unsigned_abs()));
        match self.verifier.verify_server_cert(cert, &[], &tls_name(info.host), &[], now) {
            Ok(_) => Ok(info),
            Err(rustls::Error::InvalidCertificate(
                CertificateError::UnknownIssuer | CertificateError::BadSignature,
            )) => Err(other()),
            Err(e) => Err(PkiError::malformed(place, e)),
        }
    }

    /// The roots for rustls.
    pub(crate) fn roots(&self) -> Arc<RootCertStore> {
        roots(&self.ca).expect("invariant: the same certificate was accepted in new()")
    }
}

fn roots(ca: &CertificateDer<'static>) -> Result<Arc<RootCertStore>, rustls::Error> {
    let mut store = RootCertStore::empty();
    store.add(ca.clone())?;
    Ok(Arc::new(store))
}
