//! Explanations agree with answers.

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;

use super::{POD_ON_A, addresses, start, zone};
use crate::Explanation;

#[tokio::test]
async fn an_explanation_names_those_that_are_answered() {
    let server = start(vec![]).await;
    for name in ["db.a", "web.a", "early.a", "web-1.a", "DB.prod.a.", "cache.a", "nobody.a", "a", "shop.a"] {
        let answer = server.ask(POD_ON_A, name.trim_end_matches('.'), RecordType::A).await;
        let explained = match zone().explain("a", POD_ON_A.into(), name) {
            Explanation::Pods { pods, .. } => {
                let answered = pods.iter().filter(|(_, answered)| *answered).flat_map(|(pod, _)| &pod.addresses);
                answered.filter(|address| address.is_ipv4()).count()
            }
            Explanation::Ambiguous { .. } => 0,
            Explanation::Nobody { .. } => {
                assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain, "{name}");
                continue;
            }
            other => panic!("{name}: {other:?}"),
        };
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError, "{name}");
        assert_eq!(addresses(&answer).len(), explained, "{name}");
    }
}

#[test]
fn services_addresses_and_other_names() {
    let explain = |name| zone().explain("a", POD_ON_A.into(), name);
    let Explanation::Services { pods, .. } = explain("_http._tcp.web.a") else { panic!("a service") };
    assert_eq!((pods[0].0.pod.as_str(), pods[0].1), ("web-0", 8080));
    for name in ["10.0.0.8", "8.0.0.10.in-addr.arpa.", "fd00::8"] {
        let Explanation::Address { pod, network } = explain(name) else { panic!("{name} is an address") };
        assert_eq!((pod.pod.as_str(), network.as_str()), ("web-0", "a"));
    }
    assert_eq!(explain("10.0.0.250"), Explanation::Nobody { network: "a".to_owned() });
    assert_eq!(explain("db.b"), Explanation::Elsewhere, "not a network of this pod's");
    assert_eq!(explain("example.org"), Explanation::Elsewhere);
}
