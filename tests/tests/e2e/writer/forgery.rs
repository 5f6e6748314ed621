//! What is ours in the database, and who else gets at it.

use anabranch_proto::record::ValueRef::{Integer, Text};
use anabranch_streamer::{
    postgres::writer::Outcome,
    write::{NO_HASH, Policy},
};

use super::{
    fixture::{Fixture, Program, insert},
    rejected,
};

#[tokio::test(flavor = "multi_thread")]
async fn somebody_elses_rejections_are_settled() {
    let fixture = Fixture::new("CREATE TABLE t (id int PRIMARY KEY CHECK (id < 10))").await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let (replica, mut thief) = (fixture.replica("r1"), fixture.replica("r1"));
    thief.subject = "thief".into();
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    let bad = program.transaction(&[insert(0, &[Integer(10)])]);
    let outcome = writer.apply(&replica, &NO_HASH, &bad, &rules.rules).await;
    assert_eq!(rejected(&outcome.unwrap()).sqlstate, "23514");
    // A call that uses the id of another subject may say this as any other.
    writer.books().settle(&thief, 1).await.unwrap();
    writer
        .books()
        .settle(&thief, i64::MAX as u64)
        .await
        .unwrap();
    let left = "SELECT concat_ws(' ', count(*), bool_or(settled)) FROM anabranch.rejections";
    assert_eq!(fixture.text(left).await, "1 f");
    writer.books().settle(&replica, 1).await.unwrap();
    assert_eq!(fixture.text(left).await, "1 t");
}

/// Functions of policies, checks and defaults are no triggers, and whoever wrote one may become the login role in it.
#[tokio::test(flavor = "multi_thread")]
async fn a_function_of_a_policy_claims_for_another_replica() {
    let fixture = Fixture::new(
        "CREATE TABLE t (id int PRIMARY KEY, v text);
         CREATE FUNCTION forge(v text) RETURNS bool LANGUAGE plpgsql AS $$ DECLARE app text := current_user; BEGIN
             RESET ROLE;
             IF v = 'claim' THEN
                 PERFORM anabranch.claim('r1', 'edge-1', 2, hash, '\\x01', '{}') FROM anabranch.replicas WHERE replica = 'r1';
             ELSIF v = 'reject' THEN
                 PERFORM anabranch.reject('r1', 'edge-1', 2, hash, '\\x01', '{}', NULL, 'error', '23514', '', NULL)
                    FROM anabranch.replicas WHERE replica = 'r1';
             ELSIF v = 'settle' THEN
                 PERFORM anabranch.settle('r1', 'edge-1', 100, 0);
             END IF;
             PERFORM set_config('role', app, true);
             RETURN true; END $$;
         ALTER TABLE t ENABLE ROW LEVEL SECURITY;
         CREATE POLICY forging ON t USING (true) WITH CHECK (forge(v))",
    )
    .await;
    let rules = fixture.rules(&["t"], &Policy::default()).await;
    let (one, two) = (fixture.replica("r1"), fixture.replica("r2"));
    let mut writer = fixture.writer().await;
    let mut program = Program::new(&rules, &["t"]);
    let first = program.transaction(&[insert(0, &[Integer(1), Text("fine")])]);
    let outcome = writer.apply(&one, &NO_HASH, &first, &rules.rules).await;
    assert_eq!(outcome, Ok(Outcome::Applied));
    let mut program = Program::new(&rules, &["t"]);
    let mut previous = NO_HASH;
    for (id, what) in (2..).zip(["claim", "reject", "settle"]) {
        let forged = program.transaction(&[insert(0, &[Integer(id), Text(what)])]);
        let answer = writer.apply(&two, &previous, &forged, &rules.rules).await;
        let answer = answer.unwrap();
        assert_eq!(rejected(&answer).sqlstate, "42501", "{what}: {answer:?}");
        previous = forged.hash;
    }
    assert_eq!(
        writer.books().standing(&one).await,
        Ok(Some((1, first.hash)))
    );
}

/// Whoever sets up may have said that others get rights to all that it will ever make.
#[tokio::test(flavor = "multi_thread")]
async fn default_privileges_hand_out_what_is_ours() {
    let fixture = Fixture::new(
        "DO $$ BEGIN EXECUTE format('CREATE ROLE %I', current_database() || ' other'); END $$;
         DO $$ BEGIN EXECUTE format('ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO %I', current_database() || ' other');
             EXECUTE format('ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON FUNCTIONS TO %I', current_database() || ' other');
         END $$",
    )
    .await;
    let others = "SELECT coalesce(string_agg(what || ' ' || privilege_type, ', ' ORDER BY what, privilege_type), '') FROM (
            SELECT relname::text AS what, (aclexplode(relacl)).* FROM pg_class WHERE relnamespace = 'anabranch'::regnamespace
            UNION ALL SELECT proname, (aclexplode(proacl)).* FROM pg_proc WHERE pronamespace = 'anabranch'::regnamespace AND prosecdef) a
          JOIN pg_roles r ON r.oid = a.grantee WHERE r.rolname = current_database() || ' other'";
    assert_eq!(fixture.text(others).await, "");
    // What was given on purpose is left alone.
    fixture
        .grant("GRANT SELECT ON anabranch.replicas TO {app}")
        .await;
    fixture.set_up().await;
    let given = "SELECT has_table_privilege(current_database() || ' app', 'anabranch.replicas', 'SELECT')::text";
    assert_eq!(fixture.text(given).await, "true");
}
