-- What notification-svc knows and sends. Every rule that the database can hold is here, so that no defect of the service gets past it.

-- The address book. A row without an address stands for a user of whom only orders have told: whoever writes what hangs on both the
-- user and his orders locks it.
CREATE TABLE addressees (
    user_id uuid PRIMARY KEY,
    email text CHECK (length(email) BETWEEN 3 AND 254),
    first_name text CHECK (length(first_name) BETWEEN 1 AND 100),
    CONSTRAINT addressees_known CHECK (num_nulls(email, first_name) IN (0, 2))
);

-- What the mails of an order need of it. A row without a user stands for an order of which only its payment has told so far.
CREATE TABLE orders (
    order_id uuid PRIMARY KEY,
    user_id uuid REFERENCES addressees,
    -- The order's own address: it goes before the user's.
    email text CHECK (length(email) BETWEEN 3 AND 254),
    CONSTRAINT orders_own_address CHECK (user_id IS NOT NULL OR email IS NULL)
);
CREATE INDEX orders_of_user ON orders (user_id);

-- One mail per event that it answers.
CREATE TABLE mails (
    -- The event's id.
    notification_id uuid PRIMARY KEY,
    -- In this order the mails of one order go out.
    number bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    order_id uuid NOT NULL REFERENCES orders,
    -- The event, as far as the mail is made from it.
    event_type text COLLATE "C" NOT NULL CONSTRAINT mails_answered
        CHECK (event_type IN ('order.placed', 'order.confirmed', 'order.shipped', 'order.cancelled', 'payment.refunded')),
    schema_version integer NOT NULL CHECK (schema_version > 0),
    payload bytea NOT NULL,
    -- waiting: for an address. pending: to be sent. sending: somebody is at it. sent: the mail server has taken it. failed: it never
    -- will. unknown: it may have taken it; nobody sends it again but by an operator's decision.
    state text COLLATE "C" NOT NULL CHECK (state IN ('waiting', 'pending', 'sending', 'sent', 'failed', 'unknown')),
    -- How often it was tried in vain, since it was last decided that it be sent.
    tries integer NOT NULL DEFAULT 0 CHECK (tries >= 0),
    -- When it is pending: not before this.
    due_at timestamptz,
    -- The attempt under way, or the one whose outcome is not known: who is at it, and until when, by this database's clock.
    attempt_id uuid,
    attempt_by text CHECK (attempt_by <> ''),
    lease_until timestamptz,
    -- The class of what went wrong last; never a text of the mail server's.
    trouble text COLLATE "C" CHECK (trouble ~ '^[a-z_]{1,50}$'),
    sent_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- The trace that it belongs to.
    traceparent text,
    tracestate text,

    CONSTRAINT mails_state CHECK (
        (state = 'pending') = (due_at IS NOT NULL)
        AND (state IN ('sending', 'unknown')) = (attempt_id IS NOT NULL)
        AND num_nulls(attempt_id, attempt_by, lease_until) IN (0, 3)
        AND (state = 'sent') = (sent_at IS NOT NULL)
        AND (state NOT IN ('failed', 'unknown') OR trouble IS NOT NULL)
    )
)
WITH (fillfactor = 80);

-- What is to be sent, in the order in which it is due.
CREATE INDEX mails_due ON mails (due_at) WHERE state = 'pending';
-- Attempts that may have died.
CREATE INDEX mails_leases ON mails (lease_until) WHERE state = 'sending';
-- What is not over, by order: what goes before, and what waits for an address.
CREATE INDEX mails_open ON mails (order_id, number) WHERE state IN ('waiting', 'pending', 'sending');
-- What an operator has to look at.
CREATE INDEX mails_unsettled ON mails (number) WHERE state IN ('failed', 'unknown');

-- Who decided what about a mail. Insert-only.
CREATE TABLE mails_audit (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    notification_id uuid NOT NULL REFERENCES mails,
    action text NOT NULL CHECK (action IN ('sent', 'resend')),
    -- What it was before, and why.
    state text NOT NULL CHECK (state IN ('failed', 'unknown')),
    trouble text NOT NULL,
    reason text NOT NULL CHECK (btrim(reason) <> '' AND length(reason) <= 500),
    decided_by text NOT NULL CHECK (decided_by <> ''),
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX mails_audit_by_mail ON mails_audit (notification_id);

CREATE FUNCTION mails_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% are for ever: % refused', TG_TABLE_NAME, TG_OP USING ERRCODE = 'restrict_violation';
END
$$;

-- What a mail answers and says stays; what was sent stays sent; and nothing whose outcome is not known is tried again but by
-- somebody's decision, which is in the audit by then.
CREATE FUNCTION mails_guard_change() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    -- By this very transaction.
    is_decided CONSTANT boolean := EXISTS (
        SELECT FROM mails_audit
        WHERE notification_id = OLD.notification_id AND action = 'resend' AND xmin = pg_current_xact_id()::xid
    );
BEGIN
    IF (NEW.notification_id, NEW.number, NEW.order_id, NEW.event_type, NEW.schema_version, NEW.payload, NEW.created_at)
        IS DISTINCT FROM
       (OLD.notification_id, OLD.number, OLD.order_id, OLD.event_type, OLD.schema_version, OLD.payload, OLD.created_at)
       -- In parentheses: PL/pgSQL would take the first THEN for its own.
       OR NOT (CASE OLD.state
            WHEN 'waiting' THEN NEW.state = 'pending'
            WHEN 'pending' THEN NEW.state = 'sending'
            WHEN 'sending' THEN NEW.state IN ('pending', 'sent', 'failed', 'unknown')
            WHEN 'unknown' THEN NEW.state IN ('sent', 'failed') OR (NEW.state = 'pending' AND is_decided)
            WHEN 'failed' THEN NEW.state = 'pending' AND is_decided
            ELSE false
        END)
       OR (NEW.state = 'unknown' AND NEW.attempt_id <> OLD.attempt_id)
    THEN
        RAISE EXCEPTION 'mail %: this change is refused', OLD.notification_id USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER mails_guard BEFORE UPDATE ON mails
    FOR EACH ROW EXECUTE FUNCTION mails_guard_change();
CREATE TRIGGER mails_for_ever BEFORE DELETE OR TRUNCATE ON mails
    FOR EACH STATEMENT EXECUTE FUNCTION mails_refuse_change();
CREATE TRIGGER mails_audit_for_ever BEFORE UPDATE OR DELETE OR TRUNCATE ON mails_audit
    FOR EACH STATEMENT EXECUTE FUNCTION mails_refuse_change();

-- So many seconds from now, by this database's clock alone: replicas' clocks may differ.
CREATE FUNCTION due_in(seconds double precision) RETURNS timestamptz LANGUAGE sql VOLATILE STRICT
    AS 'SELECT clock_timestamp() + make_interval(secs => seconds)';
