//! The certificate of a port: given, or self-signed and made at the first start.

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("the TLS file {} cannot be used: {problem}", path.display())]
    File { path: PathBuf, problem: String },
    #[error("a self-signed certificate could not be made: {0}")]
    Make(#[from] rcgen::Error),
    #[error("the certificate and its key do not fit: {0}")]
    Rustls(#[from] rustls::Error),
}

/// Certificate and key in `dir`; made there if they are not. Without `dir` they last as long as the process.
pub fn self_signed(dir: Option<&Path>) -> Result<Arc<ServerConfig>, TlsError> {
    let files = dir.map(|d| (d.join("tls-cert.pem"), d.join("tls-key.pem")));
    if let Some((cert, key)) = files.as_ref().filter(|(cert, key)| cert.exists() && key.exists()) {
        return from_files(cert, key);
    }
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    let made = rcgen::generate_simple_self_signed(names)?;
    if let Some((cert, key)) = &files {
        write(cert, &made.cert.pem(), 0o644)?;
        write(key, &made.signing_key.serialize_pem(), 0o600)?;
    }
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der())
        .map_err(|problem| TlsError::File { path: "memory".into(), problem: problem.into() })?;
    server(vec![made.cert.der().clone()], key)
}

fn write(path: &Path, text: &str, mode: u32) -> Result<(), TlsError> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let open = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(path);
    open.and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|e| TlsError::File { path: path.into(), problem: e.to_string() })
}

pub fn from_files(cert: &Path, key: &Path) -> Result<Arc<ServerConfig>, TlsError> {
    let bad = |path: &Path, problem: String| TlsError::File { path: path.into(), problem };
    let certs = CertificateDer::pem_file_iter(cert)
        .and_then(|certs| certs.collect::<Result<Vec<_>, _>>())
        .map_err(|e| bad(cert, e.to_string()))?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(|e| bad(key, e.to_string()))?;
    server(certs, key)
}

fn server(
    certs: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(certs, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}
