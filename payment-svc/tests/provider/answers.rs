//! Answers that no provider would give, and proxies do. Nobody may conclude from them that nothing was done.

use std::time::Instant;

use payment_svc::provider::{CallError, IntentId, UnknownOutcome};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::stage::*;

/// A server that gives every connection the same answer and then leaves it open. What it was sent comes out at the end.
async fn server(answer: Vec<u8>) -> (String, JoinHandle<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let task = tokio::spawn(async move {
        let mut requests = Vec::new();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 64 << 10];
            let length = stream.read(&mut request).await.unwrap();
            let request = String::from_utf8_lossy(&request[..length]).into_owned();
            let is_last = request.starts_with("GET /v1/payment_intents/stop");
            requests.push(request);
            if is_last {
                return requests;
            }
            let _ = stream.write_all(&answer).await;
            // Left open: whoever waits for more waits.
            tokio::spawn(async move {
                let mut rest = Vec::new();
                let _ = stream.read_to_end(&mut rest).await;
            });
        }
    });
    (url, task)
}

fn answer(status: &str, headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n{headers}\r\n{body}")
        .into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn they_leave_the_outcome_unknown() {
    for bad in [
        answer("200 OK", "", "{}"),
        answer("200 OK", "", "<html>it works</html>"),
        answer("404 Not Found", "", "<html>no such route</html>"),
        answer("400 Bad Request", "", ""),
        answer("502 Bad Gateway", "", "<html>"),
        answer("503 Service Unavailable", "retry-after: 1\r\n", ""),
        // Half an answer, half a head, none, and what is no HTTP at all.
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{\"id\":".to_vec(),
        b"HTTP/1.1 200".to_vec(),
        Vec::new(),
        b"220 mail ESMTP\r\n".to_vec(),
    ] {
        let (url, server) = server(bad).await;
        let provider = provider(&url);
        let started = Instant::now();
        is_unknown(provider.confirm_intent(&key(), &IntentId::new("pi_1")).await);
        assert!(started.elapsed() < LIMIT / 3, "{:?}", started.elapsed());
        server.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_are_not_followed_and_answers_are_bounded() {
    let elsewhere = answer("302 Found", "location: http://127.0.0.1:1/\r\n", "");
    let (url, _server) = server(elsewhere).await;
    let answer = provider(&url)
        .confirm_intent(&key(), &IntentId::new("pi_1"))
        .await;
    let followed = !matches!(
        answer,
        Err(CallError::Unknown(UnknownOutcome::Status { status: 302, .. }))
    );
    assert!(!followed, "{answer:?}");

    let size = 0x20_0000;
    let endless = format!(
        "HTTP/1.1 200 OK\r\ncontent-length: {size}0\r\n\r\n{}",
        " ".repeat(size)
    );
    let (url, _server) = server(endless.into_bytes()).await;
    let answer = provider(&url)
        .confirm_intent(&key(), &IntentId::new("pi_1"))
        .await;
    let bounded = matches!(
        answer,
        Err(CallError::Unknown(UnknownOutcome::NotUnderstood {
            what: "it is too large",
            ..
        }))
    );
    assert!(bounded, "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_is_one_request_with_its_key() {
    let (url, server) = server(answer("500 Internal Server Error", "request-id: req_9\r\n", "{}")).await;
    let provider = provider(&url);
    let error = provider
        .confirm_intent("the key", &IntentId::new("pi_1"))
        .await
        .unwrap_err();
    let CallError::Unknown(UnknownOutcome::Status {
        status: 500,
        request_id,
    }) = error
    else {
        panic!("{error:?}");
    };
    assert_eq!(request_id, "req_9");
    is_unknown(provider.intent(&IntentId::new("stop")).await);
    let requests = server.await.unwrap();
    assert_eq!(requests.len(), 2, "{requests:?}");
    let head = requests[0].to_ascii_lowercase();
    for expected in [
        "post /v1/payment_intents/pi_1/confirm http/1.1\r\n",
        "\r\nidempotency-key: the key\r\n",
        "\r\nauthorization: bearer sk_test_of_a_test\r\n",
        "\r\nstripe-version: 2026-",
        "\r\n\r\nerror_on_requires_action=true",
    ] {
        assert!(head.contains(expected), "{expected}: {head}");
    }
    assert!(!requests[1].contains("idempotency-key"), "{}", requests[1]);
}
