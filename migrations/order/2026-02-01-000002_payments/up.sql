-- Orders that are overdue, and orders whose payment was given back.

-- When it was noticed that pay_by had passed without a payment. The order goes on pending until its payments have decided.
ALTER TABLE orders ADD COLUMN overdue_at timestamptz,
    ADD CONSTRAINT orders_overdue CHECK (overdue_at >= pay_by),
    -- Nothing but a payment that was awaited in vain cancels for want of time, and nobody who paid is cancelled for want of money.
    ADD CONSTRAINT orders_unpaid CHECK (
        CASE cancelled_by
            WHEN 'not_paid_in_time' THEN paid_at IS NULL AND overdue_at IS NOT NULL
            WHEN 'payment_failed' THEN paid_at IS NULL
            WHEN 'refund' THEN paid_at IS NOT NULL
            ELSE true
        END
    ),
    DROP CONSTRAINT orders_cancelled_by_check,
    ADD CONSTRAINT orders_cancelled_by_check
        CHECK (cancelled_by IN ('user', 'out_of_stock', 'not_paid_in_time', 'payment_failed', 'refund'));

-- What is looked for every second: it holds only orders that are not paid yet. The price is that a change of status is no longer made
-- in place.
CREATE INDEX orders_to_be_paid ON orders (pay_by, order_id) WHERE status = 'pending' AND overdue_at IS NULL;
