//! Generates the wire code without a system `protoc`.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "apache/rocketmq/v2/admin.proto",
        "apache/rocketmq/v2/service.proto",
        "ferrymq/admin/v1/admin.proto",
        "ferrymq/internal/v1/internal.proto",
    ];
    let descriptors = protox::compile(files, ["proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?).join("descriptors.bin");
    std::fs::write(out, protox::prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure()
        .bytes(".apache.rocketmq.v2.Message.body")
        .bytes(".ferrymq.internal.v1.AppendMessage")
        .bytes(".ferrymq.internal.v1.Delivered")
        // The transport belongs to `runtime` and the roles; contracts do not open sockets.
        .build_transport(false)
        .codec_path("crate::codec::Frames")
        .compile_fds(descriptors)?;
    println!("cargo:rerun-if-changed=proto");
    Ok(())
}
