//! Who an agent is: its certificate, and the TLS settings that demand one of the peer.

use std::fmt;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, InvalidDnsNameError, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{CipherSuite, ClientConfig, RootCertStore, ServerConfig};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::protocol::{OLDEST, VERSION, WITH_BLAKE3};

/// What stands before a node's name in the common name of its certificate.
const PREFIX: &str = "node:";
/// What both sides speak (ALPN, RFC 7301), the newest first: the server takes the first that the client has too.
const PROTOCOLS: [(&[u8], u32); 3] =
    [(b"portolan-transfer/3", VERSION), (b"portolan-transfer/2", WITH_BLAKE3), (b"portolan-transfer/1", OLDEST)];

/// A node's certificate and key and the authority it trusts. To rotate, make a new one.
#[derive(Clone)]
pub struct Identity {
    node: String,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

/// A certificate or key that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Not PEM, or not what was expected in it.
    #[error("{what}: {source}")]
    Pem {
        /// Which of them.
        what: &'static str,
        /// What is wrong.
        source: rustls::pki_types::pem::Error,
    },
    /// There is no certificate in it.
    #[error("{0} has no certificate")]
    Empty(&'static str),
    /// Key and certificate don't fit, or an authority can't be used.
    #[error("certificate: {0}")]
    Tls(#[from] rustls::Error),
    /// The authorities can't be used to verify peers.
    #[error("authority: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
    /// The certificate is not a node's.
    #[error("the certificate's common name must be node:<name>: {0}")]
    NotANode(String),
}

impl Identity {
    /// Reads a certificate chain (own certificate first), its key, and the authorities to trust, all in PEM.
    pub fn new(cert_chain_pem: &[u8], key_pem: &[u8], ca_pem: &[u8]) -> Result<Self, IdentityError> {
        let chain = certificates("certificate chain", cert_chain_pem)?;
        let key =
            PrivateKeyDer::from_pem_slice(key_pem).map_err(|source| IdentityError::Pem { what: "key", source })?;
        let mut roots = RootCertStore::empty();
        for authority in certificates("authorities", ca_pem)? {
            roots.add(authority)?;
        }
        let (roots, provider) = (Arc::new(roots), Arc::new(provider()));
        let own = chain.first().ok_or(IdentityError::Empty("certificate chain"))?;
        Ok(Self {
            node: node_name(own)?,
            client: Arc::new(client_config(&provider, &roots, chain.clone(), key.clone_key())?),
            server: Arc::new(server_config(&provider, roots, chain, key)?),
        })
    }

    /// The node that this certificate names.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// What it connects with: TLS 1.3 only, presents its certificate, demands one of the server.
    pub fn client(&self) -> Arc<ClientConfig> {
        self.client.clone()
    }

    /// What it serves with: TLS 1.3 only, demands a certificate of the client.
    pub fn server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("node", &self.node).finish_non_exhaustive()
    }
}

/// The DNS name in the certificate of a node: what its peers demand of it.
pub fn server_name(node: &str) -> Result<ServerName<'static>, InvalidDnsNameError> {
    ServerName::try_from(format!("{node}.node.portolan.dev"))
}

fn protocols() -> Vec<Vec<u8>> {
    PROTOCOLS.map(|(name, _)| name.to_vec()).into()
}

/// The version of the protocol that was agreed on with the handshake.
pub(super) fn version_of(agreed: Option<&[u8]>) -> u32 {
    let known = PROTOCOLS.into_iter().find(|(name, _)| agreed == Some(*name));
    known.map_or(OLDEST, |(_, version)| version)
}

/// The node that a verified certificate names.
pub(super) fn node_name(certificate: &CertificateDer<'_>) -> Result<String, IdentityError> {
    let bad = |why: &dyn fmt::Display| IdentityError::NotANode(why.to_string());
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| bad(&error))?;
    let mut names = parsed.subject().iter_common_name();
    let (Some(name), None) = (names.next(), names.next()) else { return Err(bad(&"it has not exactly one")) };
    let name = name.as_str().map_err(|error| bad(&error))?;
    match name.strip_prefix(PREFIX) {
        Some(node) if !node.is_empty() => Ok(node.to_owned()),
        _ => Err(bad(&format!("{name:?}"))),
    }
}

fn certificates(what: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|source| IdentityError::Pem { what, source })?;
    if found.is_empty() { Err(IdentityError::Empty(what)) } else { Ok(found) }
}

/// AES with keys of 128 bits first, which all of TLS 1.3 have (RFC 8446, 9.1): a quarter less work for each byte than with 256.
fn provider() -> CryptoProvider {
    let mut provider = ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider
}

fn client_config(
    provider: &Arc<CryptoProvider>,
    roots: &Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ClientConfig, IdentityError> {
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(roots.clone())
        .with_client_auth_cert(chain, key)?;
    config.alpn_protocols = protocols();
    // A resumed session would outlive the certificates that it was made with.
    config.resumption = Resumption::disabled();
    Ok(config)
}

fn server_config(
    provider: &Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, IdentityError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build()?;
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    config.alpn_protocols = protocols();
    config.send_tls13_tickets = 0;
    Ok(config)
}
