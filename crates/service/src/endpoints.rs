//! Tells whoever started this process where it listens.

use std::net::SocketAddr;
use std::path::Path;

use serde_json::{Value, json};

/// Writes `{"pid": …, "grpc": "127.0.0.1:PORT", "admin": "127.0.0.1:PORT"}` so that a reader sees all of it or nothing.
///
/// # Errors
/// When the file cannot be written.
pub async fn write(path: &Path, endpoints: &[(&str, SocketAddr)]) -> std::io::Result<()> {
    let mut content = json!({ "pid": std::process::id() });
    for (name, address) in endpoints {
        content[*name] = Value::String(address.to_string());
    }
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}", std::process::id()));
    tokio::fs::write(&temporary, content.to_string()).await?;
    tokio::fs::rename(&temporary, path).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn addresses_are_written() {
        let path = std::env::temp_dir().join(format!("endpoints-{}.json", std::process::id()));
        write(&path, &[("grpc", ([127, 0, 0, 1], 5).into())])
            .await
            .expect("written");
        let text = std::fs::read_to_string(&path).expect("there");
        std::fs::remove_file(&path).expect("removable");
        let value: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(value, json!({ "pid": std::process::id(), "grpc": "127.0.0.1:5" }));
    }
}
