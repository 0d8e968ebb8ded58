//! The CNI executable against an agent that is a few lines long.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixListener,
    path::Path,
    thread,
};

use portolan_cni::{Answer, Command, Environment, Failure, Request, run};
use serde_json::{Value, json};

const PREVIOUS: &str =
    r#"{"cniVersion":"1.0.0","dns":{},"interfaces":[{"name":"eth0"}],"ips":[{"address":"10.244.1.7/24"}]}"#;

fn environment(command: &str) -> Environment {
    let variables = [
        ("CNI_COMMAND", command),
        ("CNI_CONTAINERID", "c0ffee"),
        ("CNI_NETNS", "/var/run/netns/cni-1"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/opt/cni/bin"),
        ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=db-0;K8S_POD_UID=u-1"),
    ];
    variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn without(variable: &str, command: &str) -> Environment {
    let kept = ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS"].into_iter().filter(|v| *v != variable);
    let value = |v| if v == "CNI_ARGS" { "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=db-0" } else { "x" };
    let mut variables: Vec<(String, String)> = kept.map(|v| (v.to_owned(), value(v).to_owned())).collect();
    variables.push(("CNI_COMMAND".into(), command.into()));
    variables.into_iter().collect()
}

fn config(socket: &Path) -> Value {
    let previous: Value = serde_json::from_str(PREVIOUS).unwrap();
    json!({"cniVersion": "1.0.0", "name": "primary", "type": "portolan", "agentSocket": socket, "prevResult": previous})
}

fn invoke(environment: &Environment, stdin: &str) -> (u8, Value) {
    let mut output = Vec::new();
    let code = run(environment, &mut stdin.as_bytes(), &mut output);
    let value = if output.is_empty() { Value::Null } else { serde_json::from_slice(&output).unwrap() };
    (code, value)
}

/// An agent that answers one request; returns what it was asked.
fn agent(socket: &Path, answer: Answer) -> thread::JoinHandle<Request> {
    let listener = UnixListener::bind(socket).unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
        writeln!(stream, "{}", serde_json::to_string(&answer).unwrap()).unwrap();
        serde_json::from_str(&line).unwrap()
    })
}

#[test]
fn add_asks_the_agent_and_passes_the_result_on_unchanged() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("cni.sock");
    let asked = agent(&socket, Answer::default());
    let (code, output) = invoke(&environment("ADD"), &config(&socket).to_string());
    assert_eq!((code, output.to_string()), (0, PREVIOUS.to_owned()));
    let request = asked.join().unwrap();
    assert_eq!((request.command, request.container.as_str()), (Command::Add, "c0ffee"));
    assert_eq!(request.netns.as_deref(), Some("/var/run/netns/cni-1"));
    let pod = request.pod.unwrap();
    assert_eq!((pod.namespace.as_str(), pod.name.as_str(), pod.uid.as_deref()), ("shop", "db-0", Some("u-1")));
}

#[test]
fn the_agents_refusal_reaches_the_runtime() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("cni.sock");
    let failure =
        Failure::new(Failure::ANNOTATION, "annotation portolan.dev/networks names \"bckend\"", "there are: backend");
    let asked = agent(&socket, Answer { error: Some(failure) });
    let (code, output) = invoke(&environment("ADD"), &config(&socket).to_string());
    assert_eq!((code, &output["code"], &output["cniVersion"]), (1, &json!(100), &json!("1.0.0")));
    assert_eq!(output["msg"], "annotation portolan.dev/networks names \"bckend\"");
    asked.join().unwrap();
}

#[test]
fn an_agent_that_is_down() {
    let stdin = config(Path::new("/nowhere/cni.sock")).to_string();
    let (code, output) = invoke(&environment("ADD"), &stdin);
    assert_eq!((code, &output["code"]), (1, &json!(11)));
    assert!(output["msg"].as_str().unwrap().contains("/nowhere/cni.sock"), "{output}");
    assert!(output["details"].as_str().unwrap().contains("kubectl"), "{output}");
    assert_eq!(invoke(&environment("DEL"), &stdin), (0, Value::Null));
    assert_eq!(invoke(&environment("GC"), &stdin), (0, Value::Null));
    let (code, output) = invoke(&environment("STATUS"), &stdin);
    assert_eq!((code, &output["code"]), (1, &json!(50)));
}

#[test]
fn version_needs_no_agent() {
    let (code, output) = invoke(&environment("VERSION"), r#"{"cniVersion":"0.4.0"}"#);
    let versions = json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]);
    assert_eq!((code, output), (0, json!({"cniVersion": "0.4.0", "supportedVersions": versions})));
}

#[test]
fn wrong_input_is_refused_by_its_name() {
    let good = config(Path::new("/nowhere")).to_string();
    let no_previous = r#"{"cniVersion":"1.0.0","name":"primary","type":"portolan"}"#;
    let cases = [
        (environment("ADD"), "no json", 6, "standard input"),
        (environment("ADD"), r#"{"cniVersion":"2.0.0"}"#, 1, "cniVersion: \"2.0.0\""),
        (environment("ADD"), r#"{"name":"primary"}"#, 1, "cniVersion"),
        (environment("ADD"), no_previous, 7, "prevResult"),
        (environment("JUMP"), good.as_str(), 4, "CNI_COMMAND: \"JUMP\""),
        (without("CNI_CONTAINERID", "ADD"), good.as_str(), 4, "CNI_CONTAINERID"),
        (without("CNI_NETNS", "ADD"), good.as_str(), 4, "CNI_NETNS"),
        (without("CNI_IFNAME", "DEL"), good.as_str(), 4, "CNI_IFNAME"),
        (without("CNI_ARGS", "ADD"), good.as_str(), 4, "CNI_ARGS"),
    ];
    for (environment, stdin, code, named) in cases {
        let (exit, output) = invoke(&environment, stdin);
        assert_eq!((exit, &output["code"]), (1, &json!(code)), "{output}");
        assert!(output["msg"].as_str().unwrap().contains(named), "{output} should name {named}");
    }
}
