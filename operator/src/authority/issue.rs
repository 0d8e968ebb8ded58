//! Making keys and certificates. Pure but for randomness.

use std::time::Duration;

use jiff::Timestamp;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use time::OffsetDateTime;

/// How long the authority's own certificate is valid: ten years.
const AUTHORITY_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Certificates are valid from earlier on: a node whose clock is an hour behind shall trust the others'.
const CLOCK_SKEW: Duration = Duration::from_secs(2 * 3600);

/// A certificate and its private key in PEM (RFC 7468).
#[derive(Clone)]
pub struct Pem {
    /// The certificate.
    pub certificate: String,
    /// The private key, PKCS #8.
    pub key: String,
}

/// A key or certificate could not be made or read.
#[derive(Debug, thiserror::Error)]
#[error("can't {what}")]
pub struct AuthorityError {
    what: &'static str,
    source: rcgen::Error,
}

fn failed(what: &'static str) -> impl Fn(rcgen::Error) -> AuthorityError {
    move |source| AuthorityError { what, source }
}

/// The authority: signs with the key it was loaded with.
pub struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// A new authority: ECDSA P-256, ten years.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn generate(now: Timestamp) -> Result<Pem, AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed("make the authority's key"))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name("portolan-ca");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = validity(now, AUTHORITY_LIFETIME);
        let certificate = params.self_signed(&key).map_err(failed("sign the authority's certificate"))?;
        Ok(Pem { certificate: certificate.pem(), key: key.serialize_pem() })
    }

    /// The authority with this certificate and key.
    ///
    /// # Errors
    /// When either is not readable.
    pub fn load(pem: &Pem) -> Result<Self, AuthorityError> {
        let key = KeyPair::from_pem(&pem.key).map_err(failed("read the authority's key"))?;
        let issuer =
            Issuer::from_ca_cert_pem(&pem.certificate, key).map_err(failed("read the authority's certificate"))?;
        Ok(Self { certificate: pem.certificate.clone(), issuer })
    }

    /// The authority's own certificate in PEM.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// A new key and certificate for a server that is called `names`.
    ///
    /// # Errors
    /// When a name is no DNS name, or signing fails.
    pub fn issue_server(&self, names: Vec<String>, lifetime: Duration, now: Timestamp) -> Result<Pem, AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed("make a server's key"))?;
        let mut params = CertificateParams::new(names).map_err(failed("use a server's name"))?;
        params.distinguished_name = common_name("portolan-operator");
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = validity(now, lifetime);
        let certificate = params.signed_by(&key, &self.issuer).map_err(failed("sign a server's certificate"))?;
        Ok(Pem { certificate: certificate.pem(), key: key.serialize_pem() })
    }

    /// A certificate for the key in `request`, with nothing else taken from it than `common_name` and `dns_name` as checked.
    ///
    /// # Errors
    /// When signing fails.
    pub(super) fn issue_node(
        &self,
        mut request: CertificateSigningRequestParams,
        common_name: &str,
        dns_name: &str,
        lifetime: Duration,
        now: Timestamp,
    ) -> Result<String, AuthorityError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = self::common_name(common_name);
        let dns_name = dns_name.try_into().map_err(failed("use a node's name"))?;
        params.subject_alt_names = vec![SanType::DnsName(dns_name)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = validity(now, lifetime);
        request.params = params;
        let signed: Result<Certificate, _> = request.signed_by(&self.issuer);
        Ok(signed.map_err(failed("sign a node's certificate"))?.pem())
    }
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn validity(now: Timestamp, lifetime: Duration) -> (OffsetDateTime, OffsetDateTime) {
    let now = OffsetDateTime::from_unix_timestamp(now.as_second()).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    (now - CLOCK_SKEW, now + lifetime)
}
