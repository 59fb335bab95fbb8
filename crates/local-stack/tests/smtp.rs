use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;

use local_stack::smtp::{Smtp, Tls};
use local_stack::testing::Folder;

/// What a client is told that does not encrypt.
fn greet(port: u16) -> Vec<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("listening");
    stream
        .write_all(b"EHLO test\r\nMAIL FROM:<a@b.example>\r\nQUIT\r\n")
        .expect("sent");
    BufReader::new(stream).lines().map_while(Result::ok).collect()
}

#[tokio::test]
async fn nobody_is_served_without_encryption() {
    let folder = Folder::create("smtp");
    let mut server = Smtp::start(folder.path().join("starttls"), Tls::StartTls)
        .await
        .unwrap();
    let told = greet(server.port());
    assert!(told.iter().any(|line| line.contains("STARTTLS")), "{told:?}");
    assert!(told.iter().any(|line| line.starts_with("530")), "{told:?}");
    assert_eq!(server.received().unwrap(), []);

    let port = server.port();
    server.stop().await.unwrap();
    assert!(
        TcpStream::connect(("127.0.0.1", port)).is_err(),
        "it still listens"
    );
    server.restart().await.unwrap();
    assert_eq!(server.port(), port);
    assert!(!greet(port).is_empty());

    let implicit = Smtp::start(folder.path().join("implicit"), Tls::Implicit)
        .await
        .unwrap();
    assert!(!greet(implicit.port()).iter().any(|line| line.starts_with("220")));
}
