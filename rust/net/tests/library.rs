//! What the statically linked libzmq can do: a build that lost CURVE or its platform options fails here.

#[test]
fn the_linked_library_is_the_vendored_one_with_curve() {
    assert_eq!(zmq::version(), (4, 3, 5));
    assert_eq!(zmq::has("curve"), Some(true));
    assert_eq!(zmq::has("ipc"), Some(true));
}

#[test]
fn a_key_pair_is_generated_and_never_twice_the_same() {
    let first = zmq::CurveKeyPair::new().expect("CURVE is built in");
    let second = zmq::CurveKeyPair::new().expect("CURVE is built in");
    assert_ne!(first.public_key, [0; 32]);
    assert_ne!(first.secret_key, first.public_key);
    assert_ne!(first.secret_key, second.secret_key);
}

#[test]
fn a_socket_is_woken_through_an_eventfd_that_children_do_not_inherit() {
    let context = zmq::Context::new();
    let socket = context.socket(zmq::DEALER).expect("a socket");
    let descriptor = socket.get_fd().expect("a descriptor");
    let target = std::fs::read_link(format!("/proc/self/fd/{descriptor}")).expect("/proc is mounted");
    assert_eq!(target.to_string_lossy(), "anon_inode:[eventfd]");
    let information = std::fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}")).expect("/proc is mounted");
    let flags = information.lines().find_map(|line| line.strip_prefix("flags:")).expect("a flags line").trim();
    let flags = i32::from_str_radix(flags, 8).expect("octal flags");
    assert_ne!(flags & libc::O_CLOEXEC, 0);
}
