//! Certificates for servers on loopback, made on the spot with the command line of OpenSSL.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::install;

/// What both kinds of certificate are made by, so that the machine's own configuration does not matter.
const CONFIGURATION: &str = "\
[req]
prompt = no
distinguished_name = name
[name]
CN = localhost
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth, clientAuth
subjectAltName = DNS:localhost, IP:127.0.0.1
";

/// An authority that nobody but a test trusts.
#[derive(Debug, Clone)]
pub struct Authority {
    openssl: PathBuf,
    folder: PathBuf,
}

/// A certificate and its key, both PEM; the key is unencrypted PKCS #8, for its owner alone.
#[derive(Debug, Clone)]
pub struct Certificate {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Authority {
    /// The authority in `folder`, which is made unless it is there.
    pub fn in_folder(folder: impl Into<PathBuf>) -> Result<Self> {
        let authority = Self {
            openssl: install::ensure("openssl", "openssl")?,
            folder: folder.into(),
        };
        if authority.ca_file().is_file() {
            return Ok(authority);
        }
        std::fs::create_dir_all(&authority.folder)
            .with_context(|| format!("cannot make {}", authority.folder.display()))?;
        std::fs::write(authority.folder.join("openssl.cnf"), CONFIGURATION)?;
        authority.openssl("req -x509 -config openssl.cnf -extensions authority -subj /CN=local-stack \
             -days 3650 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout ca.key -out ca.incomplete")?;
        std::fs::rename(authority.folder.join("ca.incomplete"), authority.ca_file())?;
        Ok(authority)
    }

    /// The certificate to trust, PEM.
    pub fn ca_file(&self) -> PathBuf {
        self.folder.join("ca.crt")
    }

    /// A certificate for `127.0.0.1` and `localhost`; the one made before under this name, if there is one.
    pub fn issue(&self, name: &str) -> Result<Certificate> {
        let issued = Certificate {
            certificate: self.folder.join(format!("{name}.crt")),
            key: self.folder.join(format!("{name}.key")),
        };
        if issued.certificate.is_file() {
            return Ok(issued);
        }
        self.openssl(&format!(
            "req -new -config openssl.cnf -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
             -keyout {name}.key -out {name}.csr"
        ))?;
        std::fs::set_permissions(&issued.key, std::fs::Permissions::from_mode(0o600))?;
        self.openssl(&format!(
            "x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 \
             -extfile openssl.cnf -extensions server -out {name}.incomplete"
        ))?;
        std::fs::rename(
            self.folder.join(format!("{name}.incomplete")),
            &issued.certificate,
        )?;
        Ok(issued)
    }

    /// Runs it in the folder, so that no path with a blank is among the arguments.
    fn openssl(&self, args: &str) -> Result<()> {
        let output = Command::new(&self.openssl)
            .args(args.split_whitespace())
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .output()
            .context("openssl did not start")?;
        if !output.status.success() {
            bail!(
                "openssl {args} failed ({}):\n{}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(())
    }
}
