//! Which CertificateSigningRequests are granted. Pure.

use std::time::Duration;

use k8s_openapi::api::certificates::v1::CertificateSigningRequestSpec;
use rcgen::{CertificateSigningRequestParams, DnType, DnValue, IsCa, SanType};

/// Certificates live no longer than this.
const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// What Kubernetes says of a token that is bound to a pod: the node that pod runs on (KEP-4193).
const NODE_CLAIM: &str = "authentication.kubernetes.io/node-name";
/// What a node's certificate may be used for.
const USAGES: [&str; 3] = ["client auth", "server auth", "digital signature"];

/// A request that is to be granted.
pub(super) struct Granted {
    pub(super) common_name: String,
    pub(super) dns_name: String,
    pub(super) lifetime: Duration,
    pub(super) request: CertificateSigningRequestParams,
}

/// Decides about a request for the signer `portolan.dev/node`. The error is the sentence that the requester gets to read.
///
/// Who asks is told by the API server, not by the request: only `service_account`, and only for the node that its own pod runs on.
pub(super) fn decide(spec: &CertificateSigningRequestSpec, service_account: &str) -> Result<Granted, String> {
    let asker = spec.username.as_deref().unwrap_or_default();
    if asker != service_account {
        return Err(format!("{asker:?} may not have a node's certificate: only {service_account} may"));
    }
    let claims = spec.extra.as_ref().and_then(|extra| extra.get(NODE_CLAIM)).map(Vec::as_slice);
    let Some([node]) = claims else {
        return Err(format!(
            "the requester's token doesn't say which node it is on ({NODE_CLAIM}): use the pod's own token"
        ));
    };
    let usages = spec.usages.as_deref().unwrap_or_default();
    if let Some(usage) = usages.iter().find(|usage| !USAGES.contains(&usage.as_str())) {
        return Err(format!("usage {usage:?} is not granted: only {} are", USAGES.join(", ")));
    }
    let text = std::str::from_utf8(&spec.request.0).map_err(|_| "the request is not PEM".to_owned())?;
    let request = CertificateSigningRequestParams::from_pem(text)
        .map_err(|error| format!("the request can't be read, or isn't signed by its own key: {error}"))?;

    let common_name = format!("node:{node}");
    match request.params.distinguished_name.get(&DnType::CommonName) {
        Some(given) if text_of(given) == Some(common_name.as_str()) => {}
        _ => return Err(format!("the common name must be {common_name}: the requester's pod is on that node")),
    }
    let dns_name = format!("{node}.node.portolan.dev");
    let exactly_it = matches!(request.params.subject_alt_names.as_slice(),
        [SanType::DnsName(given)] if given.as_str() == dns_name);
    if !exactly_it {
        return Err(format!("the alternative names must be exactly DNS:{dns_name}"));
    }
    if !matches!(request.params.is_ca, IsCa::NoCa | IsCa::ExplicitNoCa) {
        return Err("a node's certificate can't be an authority's".to_owned());
    }
    let wished = spec.expiration_seconds.and_then(|seconds| u64::try_from(seconds).ok()).map(Duration::from_secs);
    Ok(Granted { common_name, dns_name, lifetime: wished.map_or(LONGEST, |wished| wished.min(LONGEST)), request })
}

fn text_of(value: &DnValue) -> Option<&str> {
    match value {
        DnValue::Utf8String(text) => Some(text),
        DnValue::PrintableString(text) => Some(text.as_str()),
        DnValue::Ia5String(text) => Some(text.as_str()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::Authority;
    use k8s_openapi::ByteString;
    use rcgen::{CertificateParams, DistinguishedName, KeyPair};
    use x509_parser::prelude::{FromDer, X509Certificate};

    const ACCOUNT: &str = "system:serviceaccount:portolan-system:portolan-storage";

    fn request(common_name: &str, names: &[&str]) -> CertificateSigningRequestSpec {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, common_name);
        let key = KeyPair::generate().unwrap();
        let text = params.serialize_request(&key).unwrap().pem().unwrap();
        CertificateSigningRequestSpec {
            request: ByteString(text.into_bytes()),
            signer_name: portolan_crds::NODE_SIGNER.to_owned(),
            username: Some(ACCOUNT.to_owned()),
            extra: Some([(NODE_CLAIM.to_owned(), vec!["node1".to_owned()])].into()),
            usages: Some(vec!["client auth".to_owned(), "server auth".to_owned(), "digital signature".to_owned()]),
            ..Default::default()
        }
    }

    fn good() -> CertificateSigningRequestSpec {
        request("node:node1", &["node1.node.portolan.dev"])
    }

    fn refused(spec: &CertificateSigningRequestSpec, why: &str) {
        let message = decide(spec, ACCOUNT).err().expect("refused");
        assert!(message.contains(why), "{message}");
    }

    #[test]
    fn a_node_gets_its_own_certificate_and_no_more() {
        let mut spec = good();
        spec.expiration_seconds = Some(7 * 24 * 3600);
        let granted = decide(&spec, ACCOUNT).expect("granted");
        let now = jiff::Timestamp::now();
        let pem = Authority::generate(now).unwrap();
        let authority = Authority::load(&pem).unwrap();
        let Granted { common_name, dns_name, lifetime, request } = granted;
        let issued = authority.issue_node(request, &common_name, &dns_name, lifetime, now).unwrap();

        let (_, der) = x509_parser::pem::parse_x509_pem(issued.as_bytes()).unwrap();
        let (_, certificate) = X509Certificate::from_der(&der.contents).unwrap();
        let (_, root) = x509_parser::pem::parse_x509_pem(pem.certificate.as_bytes()).unwrap();
        let root = root.parse_x509().unwrap();
        certificate.verify_signature(Some(root.public_key())).unwrap();
        assert_eq!(certificate.subject().to_string(), "CN=node:node1");
        assert_eq!(certificate.validity().not_after.timestamp(), now.as_second() + 24 * 3600);
        for certificate in [&certificate, &root] {
            let behind = now.as_second() - 3600;
            assert!(certificate.validity().not_before.timestamp() < behind, "a node's clock may be an hour behind");
        }
        assert!(!certificate.is_ca());
    }

    #[test]
    fn others_and_other_nodes_are_refused() {
        let mut other = good();
        other.username = Some("system:serviceaccount:default:portolan-storage".to_owned());
        refused(&other, "may not have a node's certificate");

        let mut unbound = good();
        unbound.extra = None;
        refused(&unbound, "which node it is on");

        refused(&request("node:node2", &["node1.node.portolan.dev"]), "common name must be node:node1");
        refused(&request("node:node1", &["node2.node.portolan.dev"]), "exactly DNS:node1.node.portolan.dev");
        refused(&request("node:node1", &["node1.node.portolan.dev", "kubernetes.default.svc"]), "exactly");
        refused(&request("node:node1", &[]), "exactly");
    }

    #[test]
    fn other_uses_and_unreadable_requests_are_refused() {
        let mut usage = good();
        usage.usages = Some(vec!["cert sign".to_owned()]);
        refused(&usage, "cert sign");
        let mut garbage = good();
        garbage.request = ByteString(b"-----BEGIN".to_vec());
        refused(&garbage, "can't be read");
    }
}
