//! TLS as VMFS uses it: version 1.3 only, ring only, no resumption, certificates of one CA.

use std::sync::{Arc, OnceLock};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};
use sha2::{Digest as _, Sha256};

use crate::error::NetError;
use crate::pki::HostIdentity;

/// ALPN between hosts.
pub(crate) const ALPN_PEER: &[u8] = b"vmfs/1";
/// ALPN towards the enrolment endpoint, the only one open to a client without a certificate.
pub(crate) const ALPN_ENROL: &[u8] = b"vmfs-enrol/1";

/// The ring provider, named explicitly: never the process-wide default.
pub(crate) fn provider(aes128: bool) -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    if aes128 {
        // Half the rounds of AES-256 matter where encryption is most of the CPU time.
        provider.cipher_suites.sort_by_key(|s| s.suite() != rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    }
    Arc::new(provider)
}

fn chain(identity: &HostIdentity) -> Vec<CertificateDer<'static>> {
    // The CA's certificate goes along for joining hosts, who know only its fingerprint.
    vec![identity.certificate().clone(), identity.trust().ca().clone()]
}

fn private_key(identity: &HostIdentity) -> PrivateKeyDer<'static> {
    PrivatePkcs8KeyDer::from(identity.key().to_pkcs8_der().to_vec()).into()
}

/// The side that is dialled.
pub(crate) fn server(identity: &HostIdentity, aes128: bool) -> Result<QuicServerConfig, NetError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(identity.trust().roots(), provider(aes128))
        .allow_unauthenticated()
        .build()
        .map_err(|e| rustls::Error::General(e.to_string()))?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider(aes128))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain(identity), private_key(identity))?;
    config.alpn_protocols = vec![ALPN_PEER.to_vec(), ALPN_ENROL.to_vec()];
    // A resumed session would outlive the removal of its host.
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    QuicServerConfig::try_from(config).map_err(|e| NetError::Tls(rustls::Error::General(e.to_string())))
}

/// The side that dials another host.
pub(crate) fn client(identity: &HostIdentity, aes128: bool) -> Result<QuicClientConfig, NetError> {
    let mut config = rustls::ClientConfig::builder_with_provider(provider(aes128))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(identity.trust().roots())
        .with_client_auth_cert(chain(identity), private_key(identity))?;
    config.alpn_protocols = vec![ALPN_PEER.to_vec()];
    config.resumption = Resumption::disabled();
    QuicClientConfig::try_from(config).map_err(|e| NetError::Tls(rustls::Error::General(e.to_string())))
}

/// The side that dials an enrolment endpoint.
pub(crate) fn joiner(pin: Arc<PinnedCa>) -> Result<QuicClientConfig, NetError> {
    let mut config = rustls::ClientConfig::builder_with_provider(provider(true))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(pin)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_ENROL.to_vec()];
    config.resumption = Resumption::disabled();
    QuicClientConfig::try_from(config).map_err(|e| NetError::Tls(rustls::Error::General(e.to_string())))
}

/// SHA-256 of a certificate.
pub(crate) fn fingerprint(cert: &CertificateDer<'_>) -> [u8; 32] {
    Sha256::digest(cert.as_ref()).into()
}

/// Accepts a server whose certificate chains to the CA with a known fingerprint. The CA's certificate
/// itself comes from the server; everything else is the standard verification against it.
#[derive(Debug)]
pub(crate) struct PinnedCa {
    fingerprint: [u8; 32],
    provider: Arc<CryptoProvider>,
    found: OnceLock<CertificateDer<'static>>,
}

impl PinnedCa {
    pub(crate) fn new(fingerprint: [u8; 32]) -> Self {
        Self { fingerprint, provider: provider(true), found: OnceLock::new() }
    }

    /// The CA's certificate, after a successful handshake.
    pub(crate) fn ca(&self) -> Option<&CertificateDer<'static>> {
        self.found.get()
    }
}

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let ca = intermediates
            .iter()
            .find(|c| fingerprint(c) == self.fingerprint)
            .ok_or(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer))?
            .clone()
            .into_owned();
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone())?;
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
                .build()
                .map_err(|e| rustls::Error::General(e.to_string()))?;
        let verified = verifier.verify_server_cert(end_entity, &[], server_name, ocsp, now)?;
        // Set already when the same verifier is used for a second attempt: it is the same certificate.
        let _ = self.found.set(ca);
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
