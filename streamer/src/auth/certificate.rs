//! The name in a client's certificate. That the certificate is good was verified by the connection.

use std::{sync::Arc, time::SystemTime};

use serde_json::Map;
use x509_cert::{
    der::{
        Decode, Tag, Tagged,
        oid::{AssociatedOid, db::rfc4519::CN},
    },
    ext::pkix::{SubjectAltName, name::GeneralName},
};

use super::{Principal, Proof, Refused};

/// Bytes of a name: as many as a name of DNS has at most.
const NAME_BYTES_MAX: usize = 255;

/// A certificate that a client showed.
#[derive(Clone, Debug)]
pub struct Certificate {
    name: Option<Arc<str>>,
    expires: SystemTime,
}

impl Certificate {
    /// Reads one (DER). `None`: it is none.
    pub fn parse(der: &[u8]) -> Option<Certificate> {
        let certificate = x509_cert::Certificate::from_der(der).ok()?.tbs_certificate;
        let named = alternative(&certificate).or_else(|| common(&certificate));
        Some(Certificate {
            name: named.filter(|name| is_name(name)).map(Arc::from),
            expires: certificate.validity.not_after.to_system_time(),
        })
    }

    /// Whose it is: its first URI among the subject's alternative names; else the first DNS name there; else its common name, if
    /// there is exactly one.
    pub fn name(&self) -> Option<Arc<str>> {
        self.name.clone()
    }

    /// Who shows it, where it is as good as a token. Its only claim is `sub`.
    pub(super) fn principal(&self) -> Result<Principal, Refused> {
        let name = self.name.as_deref().ok_or(Refused::Nameless)?;
        let claims = Map::from_iter([("sub".to_owned(), name.into())]);
        Ok(super::principal(
            claims,
            Some(self.expires),
            Proof::Certificate,
        ))
    }
}

fn is_name(name: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len()) && !name.chars().any(char::is_control)
}

fn alternative(certificate: &x509_cert::TbsCertificate) -> Option<String> {
    let extensions = certificate.extensions.as_ref()?;
    let extension = extensions
        .iter()
        .find(|extension| extension.extn_id == SubjectAltName::OID)?;
    let SubjectAltName(names) = SubjectAltName::from_der(extension.extn_value.as_bytes()).ok()?;
    let uri = names.iter().find_map(|name| match name {
        GeneralName::UniformResourceIdentifier(uri) => Some(uri.to_string()),
        _ => None,
    });
    let dns = || {
        names.iter().find_map(|name| match name {
            GeneralName::DnsName(dns) => Some(dns.to_string()),
            _ => None,
        })
    };
    uri.or_else(dns)
}

fn common(certificate: &x509_cert::TbsCertificate) -> Option<String> {
    let parts = certificate.subject.0.iter().flat_map(|part| part.0.iter());
    let mut names = parts.filter(|part| part.oid == CN).map(|part| {
        let is_text = matches!(part.value.tag(), Tag::Utf8String | Tag::PrintableString);
        let text = std::str::from_utf8(part.value.value()).ok();
        text.filter(|_| is_text).map(str::to_owned)
    });
    let name = names.next()?;
    names.next().is_none().then_some(name)?
}
