//! A certificate authority of a test's own.

use std::{fs, path::PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, IsCa, KeyPair,
};
use tempfile::TempDir;

/// An authority that nobody trusts but who is told to.
#[derive(Debug)]
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: TempDir,
}

/// A certificate and its key, PEM.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// Of the certificate alone: the authority signed it itself.
    pub certificate: String,
    /// Its key.
    pub key: String,
}

impl Authority {
    /// A new one.
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("make a key");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("make an authority");
        let dir = TempDir::with_prefix("anabranch-authority-").expect("make a directory");
        Self { issuer, dir }
    }

    /// Its own certificate, which is what must be trusted. PEM.
    pub fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// A certificate for names and addresses.
    pub fn certify(&self, names: &[&str]) -> Certificate {
        self.sign(names, |_| {})
    }

    /// One that was good until 2020.
    pub fn certify_expired(&self, names: &[&str]) -> Certificate {
        self.sign(names, |params| {
            params.not_before = rcgen::date_time_ymd(2019, 1, 1);
            params.not_after = rcgen::date_time_ymd(2020, 1, 1);
        })
    }

    /// One of nobody.
    pub fn certify_nameless(&self) -> Certificate {
        self.sign(&[], |params| {
            params.distinguished_name = DistinguishedName::new();
        })
    }

    fn sign(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Certificate {
        let key = KeyPair::generate().expect("make a key");
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        change(&mut params);
        let certificate = params
            .signed_by(&key, &self.issuer)
            .expect("make a certificate");
        Certificate {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        }
    }

    /// Writes something to a file that lives as long as this does.
    pub fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, content).expect("write a file");
        path
    }
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}
