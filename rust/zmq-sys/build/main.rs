//! Builds libzmq 4.3.5 statically with CURVE over libsodium, by gcc and g++ alone: no cmake, no clang, no network.
//! `zeromq-src` compiles the library with an empty `platform.hpp` after its own include folders, so this script
//! puts a folder in front that holds our `platform.hpp` and a `sodium.h` which names the one that
//! `libsodium-sys-stable` unpacked. It knows nothing of Rust code; the outcome is two static archives.

use std::env;
use std::fs;
use std::path::PathBuf;

fn variable(name: &str) -> PathBuf {
    PathBuf::from(
        env::var_os(name)
            .unwrap_or_else(|| panic!("{name} is not set; build zmq-sys with cargo, after libsodium-sys-stable")),
    )
}

fn main() {
    println!("cargo:rerun-if-changed=build/main.rs");
    println!("cargo:rerun-if-changed=build/platform.hpp");
    let include = variable("OUT_DIR").join("platform");
    fs::create_dir_all(&include).expect("OUT_DIR is writable");
    let platform = variable("CARGO_MANIFEST_DIR").join("build/platform.hpp");
    fs::copy(platform, include.join("platform.hpp")).expect("build/platform.hpp is part of this crate");
    let sodium = variable("DEP_SODIUM_INCLUDE").join("sodium.h");
    // A forwarding header: `sodium.h` includes its parts relative to its own folder.
    fs::write(include.join("sodium.h"), format!("#include \"{}\"\n", sodium.display())).expect("OUT_DIR is writable");
    let libsodium = zeromq_src::LibLocation::new(variable("DEP_SODIUM_LIB"), include);
    zeromq_src::Build::new().with_libsodium(Some(libsodium)).build();
}
