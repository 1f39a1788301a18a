-- Limits that several machines count together: one call is one step of one request, and atomic.
--
-- KEYS: 1 the account of the request's key, 2 that of its model, 3 the grants of its worker.
-- ARGV: 1 the operation, 2 its arguments in JSON. Answers JSON.
--
-- An account is a hash: running, reserved, spent, day, used, held (tokens reserved of that day), seconds, and
-- for each window w in r, m, t: wh (head), we (tail), ws (sum), wo (opened), wf (freed), and entries w:N "time amount".
-- The windows are those of gateway/windows.py, with the same numbers. A grant is JSON in its worker's hash.
local ENTRIES, EXACT, TICK, DAY = 256, 128, 5e-6, 86400
local key, model, grants = KEYS[1], KEYS[2], KEYS[3]
local arg = cjson.decode(ARGV[2])

local now = arg.now
if not now then
  local time = redis.call('TIME')
  now = time[1] + time[2] / 1e6
end
local today = math.floor(now / DAY)

local function number(account, field)
  return tonumber(redis.call('HGET', account, field) or 0)
end

local function change(account, field, by)
  if by ~= 0 then
    redis.call('HINCRBY', account, field, string.format('%.0f', by))
  end
end

local function ring(account, w)
  local found = redis.call('HMGET', account, w .. 'h', w .. 'e', w .. 's')
  return tonumber(found[1] or 0), tonumber(found[2] or 0), tonumber(found[3] or 0)
end

local function entry(account, w, place)
  local text = redis.call('HGET', account, w .. ':' .. place % ENTRIES)
  local time, amount = string.match(text or '0 0', '(%S+) (%S+)')
  return tonumber(time), tonumber(amount)
end

local function write(account, w, place, time, amount)
  redis.call('HSET', account, w .. ':' .. place % ENTRIES, string.format('%.6f %.0f', time, amount))
end

-- Seconds until amount fits: 0 now, -1 never.
local function wait(account, window, amount)
  local w, limit, span = window[1], window[2], window[3]
  local head, tail, total = ring(account, w)
  local first = head
  while head < tail do
    local time, held = entry(account, w, head)
    if held > 0 and time + span > now + TICK then break end
    redis.call('HDEL', account, w .. ':' .. head % ENTRIES)
    if held > 0 and total >= limit then
      redis.call('HSET', account, w .. 'f', string.format('%.6f', time + span))
    end
    total = total - held
    head = head + 1
  end
  if head ~= first then
    redis.call('HSET', account, w .. 'h', head, w .. 's', string.format('%.0f', total))
  end
  local over = total + amount - limit
  if over <= 0 then return 0 end
  if amount > limit then return -1 end
  local left = now
  while over > 0 and head < tail do
    local time, held = entry(account, w, head)
    left, over, head = time, over - held, head + 1
  end
  return left + span - now
end

local function joins(account, window, head, tail, held)
  if tail - head >= ENTRIES then return true end
  if now - number(account, window[1] .. 'o') >= window[5] then return false end
  return held < window[4] or (tail - head >= EXACT and window[2] > EXACT)
end

local function add(account, window, amount)
  local w, at = window[1], now
  local head, tail = ring(account, w)
  change(account, w .. 's', amount)
  local freed = number(account, w .. 'f')
  if freed > 0 then
    at = math.max(freed, now - window[6])
    redis.call('HDEL', account, w .. 'f')
  end
  if tail > head then
    local _, held = entry(account, w, tail - 1)
    if joins(account, window, head, tail, held) then
      write(account, w, tail - 1, at, held + amount)
      return tail - 1
    end
  end
  write(account, w, tail, at, amount)
  redis.call('HSET', account, w .. 'e', tail + 1, w .. 'o', string.format('%.6f', at))
  return tail
end

local function correct(account, w, place, less)
  local head, tail = ring(account, w)
  if head <= place and place < tail then
    local time, held = entry(account, w, place)
    less = math.min(less, held)
    write(account, w, place, time, held - less)
    change(account, w .. 's', -less)
  end
end

-- {limit, what is left, seconds until all is back} of the tightest window.
local function tightest(account, windows)
  local found
  for _, window in ipairs(windows) do
    local head, tail, total = ring(account, window[1])
    local left = math.max(0, window[2] - total)
    if not found or left < found[2] then
      local reset = 0
      if tail > head then
        reset = math.max(0, entry(account, window[1], tail - 1) + window[3] - now)
      end
      found = {window[2], left, reset}
    end
  end
  return found
end

local function token_allowance(account, plan)
  local found = plan.tokens and tightest(account, {plan.tokens})
  if plan.tokens_per_day > 0 then
    local left = math.max(0, plan.tokens_per_day - number(account, 'used') - number(account, 'held'))
    if not found or left < found[2] then
      found = {plan.tokens_per_day, left, DAY - now % DAY}
    end
  end
  return found
end

local function smaller(one, other)
  if not one or (other and other[2] < one[2]) then return other end
  return one
end

local function roll(account, floor)
  if today > number(account, 'day') then
    redis.call('HSET', account, 'day', today, 'used', 0, 'held', 0)
  end
  -- What a machine has heard, or its ledger knows, is never more than the truth, and has nothing in it that is
  -- yet to be told; but it may be more than a Redis that lost its data knows.
  if floor then
    if floor[1] > number(account, 'spent') then
      redis.call('HSET', account, 'spent', string.format('%.0f', floor[1]))
    end
    if floor[2] == number(account, 'day') and floor[3] > number(account, 'used') then
      redis.call('HSET', account, 'used', string.format('%.0f', floor[3]))
    end
  end
end

local function request_refusals(refused, side, account, plan)
  for _, window in ipairs(plan.requests) do
    local seconds = wait(account, window, 1)
    if seconds ~= 0 then table.insert(refused, {side, window[1], seconds}) end
  end
  if plan.concurrency > 0 and number(account, 'running') >= plan.concurrency then
    table.insert(refused, {side, 'c', number(account, 'seconds') / plan.concurrency})
  end
end

local function reserve_refusals(refused, side, account, plan)
  if plan.tokens then
    local seconds = wait(account, plan.tokens, arg.tokens)
    if seconds ~= 0 then table.insert(refused, {side, 't', seconds}) end
  end
  local used = number(account, 'used') + number(account, 'held') + arg.tokens
  if plan.tokens_per_day > 0 and used > plan.tokens_per_day then
    table.insert(refused, {side, 'd', DAY - now % DAY})
  end
  if plan.budget then
    local left = plan.budget - number(account, 'spent') - number(account, 'reserved')
    if arg.money > left then table.insert(refused, {side, 'b', left}) end
  end
end

-- Count a request: the entries of its windows, and whether it is among those that run.
local function begin(account, plan)
  local entries = {}
  for _, window in ipairs(plan.requests) do
    table.insert(entries, {window[1], add(account, window, 1)})
  end
  if plan.concurrency > 0 then change(account, 'running', 1) end
  return {account = account, entries = entries, runs = plan.concurrency > 0}
end

local function hold(side, plan, grant, tokens, money)
  change(side.account, 'reserved', money)
  if number(side.account, 'day') == grant.day then change(side.account, 'held', tokens) end
  return plan.tokens and add(side.account, plan.tokens, tokens)
end

-- Take back what a grant holds of an account, less what was used.
local function release(side, grant, refused)
  change(side.account, 'reserved', -grant.money)
  if number(side.account, 'day') == grant.day then change(side.account, 'held', -grant.tokens) end
  if side.runs then change(side.account, 'running', -1) end
  if refused then
    for _, one in ipairs(side.entries) do correct(side.account, one[1], one[2], 1) end
  end
end

local function spend(account, plan, day, tokens, money)
  roll(account)
  change(account, 'spent', money)
  if number(account, 'day') == day then change(account, 'used', tokens) end
  if plan.tokens and tokens > 0 then add(account, plan.tokens, tokens) end
end

local function settle(side, grant, plan, tokens, money, refused)
  roll(side.account)
  release(side, grant, refused)
  if side.runs then
    local mean, seconds = number(side.account, 'seconds'), now - grant.since
    if mean > 0 then seconds = mean * 0.8 + seconds * 0.2 end
    redis.call('HSET', side.account, 'seconds', string.format('%.6f', seconds))
  end
  local reserved = 0
  if side.entry then
    reserved = grant.tokens
    if tokens < reserved then correct(side.account, 't', side.entry, reserved - tokens) end
  end
  change(side.account, 'spent', money)
  if number(side.account, 'day') == grant.day then change(side.account, 'used', tokens) end
  if plan.tokens and tokens > reserved then add(side.account, plan.tokens, tokens - reserved) end
end

local function load(id)
  local text = redis.call('HGET', grants, id)
  return text and cjson.decode(text)
end

local function store(id, grant)
  redis.call('HSET', grants, id, cjson.encode(grant))
end

local function forget(worker)
  for _, text in ipairs(redis.call('HVALS', worker)) do
    local grant = cjson.decode(text)
    for _, side in ipairs({grant.key, grant.model}) do
      release(side, grant)
      if side.entry and not grant.used then correct(side.account, 't', side.entry, grant.tokens) end
    end
  end
  redis.call('DEL', worker)
end

local function known(account)
  local found = redis.call('HMGET', account, 'spent', 'day', 'used')
  return {tonumber(found[1] or 0), tonumber(found[2] or 0), tonumber(found[3] or 0)}
end

local operations = {}

function operations.admit()
  local refused = {}
  request_refusals(refused, 1, key, arg.key)
  if #refused == 0 then
    store(arg.id, {key = begin(key, arg.key), tokens = 0, money = 0, day = today, since = now})
  end
  return {refused = refused, requests = tightest(key, arg.key.requests)}
end

function operations.reserve()
  local refused, grant = {}, load(arg.id)
  -- Forgotten in the meantime, or the key has no limit of requests.
  if not grant then grant = {key = {account = key, entries = {}, runs = false}, since = now} end
  roll(key, arg.key_floor)
  reserve_refusals(refused, 1, key, arg.key)
  if arg.model then
    roll(model, arg.model_floor)
    request_refusals(refused, 2, model, arg.model)
    reserve_refusals(refused, 2, model, arg.model)
  end
  if #refused > 0 then
    grant.tokens, grant.money, grant.day = 0, 0, today
    release(grant.key, grant, true)
    redis.call('HDEL', grants, arg.id)
  else
    grant.tokens, grant.money, grant.day = arg.tokens, arg.money, today
    grant.key.entry = hold(grant.key, arg.key, grant, arg.tokens, arg.money)
    if arg.model then
      grant.model = begin(model, arg.model)
      grant.model.entry = hold(grant.model, arg.model, grant, arg.tokens, arg.money)
    end
    store(arg.id, grant)
  end
  local requests, tokens = tightest(key, arg.key.requests), token_allowance(key, arg.key)
  if arg.model then
    requests = smaller(requests, tightest(model, arg.model.requests))
    tokens = smaller(tokens, token_allowance(model, arg.model))
  end
  return {refused = refused, requests = requests, tokens = tokens, key = known(key), model = known(model)}
end

-- What goes beyond the reservation is reserved too, whether it fits or not.
function operations.use()
  local grant = load(arg.id)
  if grant then
    local tokens, money = math.max(0, arg.tokens - grant.tokens), math.max(0, arg.money - grant.money)
    hold(grant.key, arg.key, grant, tokens, money)
    if grant.model then hold(grant.model, arg.model, grant, tokens, money) end
    grant.tokens, grant.money, grant.used = grant.tokens + tokens, grant.money + money, true
    store(arg.id, grant)
  end
  return {refused = {}}
end

function operations.settle()
  local grant = load(arg.id)
  roll(key, arg.key_floor)
  if arg.model_floor then roll(model, arg.model_floor) end
  if grant then
    settle(grant.key, grant, arg.key, arg.tokens, arg.money, arg.refused)
    if grant.model then settle(grant.model, grant, arg.model, arg.tokens, arg.money, arg.refused) end
    redis.call('HDEL', grants, arg.id)
  elseif not arg.refused then
    local day = arg.day or today
    spend(key, arg.key, day, arg.tokens, arg.money)
    if arg.model then spend(model, arg.model, day, arg.tokens, arg.money) end
  end
  return {refused = {}, key = known(key), model = known(model)}
end

-- A worker lives; those that are silent for too long are forgotten, and those that it takes the place of.
-- Where all were silent Redis itself was away: then each has that long to be heard again.
-- KEYS: 1 the hash of silence times, 2 this worker's own prefix.
function operations.beat()
  local beats, newest = redis.call('HGETALL', key), 0
  for place = 2, #beats, 2 do newest = math.max(newest, tonumber(beats[place])) end
  local was_away = newest + arg.patience < now
  for place = 1, #beats, 2 do
    local worker, last = beats[place], was_away and now or tonumber(beats[place + 1])
    local replaced = worker ~= grants and string.sub(worker, 1, #arg.place) == arg.place
    if replaced or last + arg.patience < now then
      forget(worker)
      redis.call('HDEL', key, worker)
    elseif was_away then
      redis.call('HSET', key, worker, string.format('%.6f', now))
    end
  end
  redis.call('HSET', key, grants, string.format('%.6f', now))
  return {refused = {}}
end

function operations.usage()
  roll(key)
  local usage = {}
  for _, field in ipairs({'running', 'reserved', 'spent', 'day', 'used'}) do
    table.insert(usage, number(key, field))
  end
  return {usage = usage}
end

function operations.reset()
  redis.call('DEL', key)
  return {refused = {}}
end

-- Steps that are told again, because nobody heard the answer, are numbered: each happens once.
if arg.number then
  local told = grants .. ':told'
  if tonumber(redis.call('GET', told) or -1) >= arg.number then
    return cjson.encode({key = known(key), model = known(model)})
  end
  redis.call('SET', told, arg.number, 'EX', DAY)
end
return cjson.encode(operations[ARGV[1]]())
