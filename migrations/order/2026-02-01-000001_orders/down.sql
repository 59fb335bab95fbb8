DROP TABLE orders;
DROP FUNCTION orders_refuse_change();
