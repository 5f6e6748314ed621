//! Tokens signed by a key of a test's own, and whoever publishes such keys.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use rcgen::KeyPair;
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpListener,
    task::JoinHandle,
};
use tokio_rustls::TlsAcceptor;

use crate::authority::{Authority, Certificate};

/// What the streamer allows clocks to differ by.
pub const LEEWAY_SECONDS: i64 = 60;

/// Seconds since 1970, so many seconds from now.
pub fn at(seconds: i64) -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.expect("after 1970").as_secs().cast_signed() + seconds
}

/// A key of ES256 with a name.
#[derive(Debug)]
pub struct Signer {
    kid: String,
    key: KeyPair,
}

impl Signer {
    /// A new key.
    pub fn new(kid: &str) -> Self {
        Self {
            kid: kid.to_owned(),
            key: KeyPair::generate().expect("make a key"),
        }
    }

    /// A token that names the key.
    pub fn token(&self, claims: &Value) -> String {
        self.token_named(Some(&self.kid), claims)
    }

    /// A token that names any key.
    pub fn token_named(&self, kid: Option<&str>, claims: &Value) -> String {
        let mut header = Header::new(Algorithm::ES256);
        header.kid = kid.map(str::to_owned);
        let key = EncodingKey::from_ec_pem(self.key.serialize_pem().as_bytes());
        encode(&header, claims, &key.expect("a key in PEM")).expect("sign a token")
    }

    /// The public half, as it is published.
    pub fn jwk(&self) -> Value {
        let point = self.key.public_key_raw();
        json!({
            "kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": self.kid,
            "x": base64url(&point[1..33]), "y": base64url(&point[33..65]),
        })
    }

    /// The public half, PEM.
    pub fn public_pem(&self) -> String {
        self.key.public_key_pem()
    }
}

/// A server that publishes keys, or answers something else.
#[derive(Debug)]
pub struct Issuer {
    port: u16,
    scheme: &'static str,
    answer: Arc<Mutex<String>>,
    asked: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Issuer {
    /// Publishes these.
    pub async fn start(signers: &[&Signer]) -> Self {
        Self::serve(signers, None).await
    }

    /// Publishes these by TLS, as `localhost`.
    pub async fn start_tls(signers: &[&Signer], authority: &Authority) -> Self {
        let Certificate { certificate, key } = authority.certify(&["localhost"]);
        let certificate = CertificateDer::from_pem_slice(certificate.as_bytes());
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes());
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions of TLS")
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.expect("a certificate")],
                key.expect("a key"),
            )
            .expect("they belong together");
        Self::serve(signers, Some(TlsAcceptor::from(Arc::new(config)))).await
    }

    async fn serve(signers: &[&Signer], tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
        let port = listener.local_addr().expect("an address").port();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let says = Arc::new(Mutex::new(published(signers)));
        let asked = Arc::new(AtomicU64::new(0));
        let (answer, counts) = (says.clone(), asked.clone());
        let task = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else {
                    continue;
                };
                let say = says.lock().expect("no panic under it").clone();
                match &tls {
                    None => one(stream, &say, &counts).await,
                    Some(tls) => {
                        if let Ok(stream) = tls.accept(stream).await {
                            one(stream, &say, &counts).await;
                        }
                    }
                }
            }
        });
        Self {
            port,
            scheme,
            answer,
            asked,
            task,
        }
    }

    /// Where.
    pub fn url(&self) -> String {
        let (scheme, port) = (self.scheme, self.port);
        format!("{scheme}://localhost:{port}/.well-known/jwks.json")
    }

    /// Publishes others from here on.
    pub fn publish(&self, signers: &[&Signer]) {
        self.say(published(signers));
    }

    /// Answers this from here on, which is a whole answer of HTTP.
    pub fn say(&self, answer: String) {
        *self.answer.lock().expect("no panic under it") = answer;
    }

    /// How often it was asked.
    pub fn asked(&self) -> u64 {
        self.asked.load(Ordering::SeqCst)
    }
}

impl Drop for Issuer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Answers one request.
async fn one(mut stream: impl AsyncRead + AsyncWrite + Unpin, say: &str, counts: &AtomicU64) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    counts.fetch_add(1, Ordering::SeqCst);
    let _ = stream.write_all(say.as_bytes()).await;
    let _ = stream.shutdown().await;
}

/// A whole answer of HTTP.
pub fn answer(status: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

fn published(signers: &[&Signer]) -> String {
    let keys: Vec<_> = signers.iter().map(|signer| signer.jwk()).collect();
    answer("200 OK", &json!({ "keys": keys }).to_string())
}

/// Without padding.
fn base64url(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let mut word = [0; 4];
        word[1..=chunk.len()].copy_from_slice(chunk);
        let word = u32::from_be_bytes(word);
        for i in 0..=chunk.len() {
            text.push(char::from(ALPHABET[(word >> (18 - 6 * i)) as usize & 63]));
        }
    }
    text
}
