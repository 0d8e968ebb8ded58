//! Tests of Portolan that need no cluster: real pools on files, real network namespaces, a fake API server.
//! They are all in one test binary, `main.rs`.
