//! Compiles the `.proto` file without `protoc`.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    let file = "anabranch/v1/anabranch.proto";
    println!("cargo:rerun-if-changed={file}");
    let descriptors = protox::compile([file], ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("anabranch.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .bytes(".")
        .codec_path("crate::codec::SmallBuffers")
        .build_server(false)
        .compile_fds(descriptors.clone())?;
    // The same messages, but what is sent down: that is written as bytes.
    let server = out.join("server");
    fs::create_dir_all(&server)?;
    tonic_prost_build::configure()
        .out_dir(server)
        .codec_path("crate::codec::SmallBuffers")
        .build_client(false)
        .extern_path(".anabranch.v1", "crate::v1")
        .extern_path(".anabranch.v1.Down", "crate::down::Encoded")
        .compile_fds(descriptors)?;
    Ok(())
}
