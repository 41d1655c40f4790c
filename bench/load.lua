-- wrk's script. Arguments: how many of ten requests are posts, and a file with a post's JSON body
-- in each line. At the end it writes a summary as one line of JSON; times are microseconds.

local bodies, posts_of_ten, count = {}, 0, 0

local function mixed()
   count = count + 1
   if count % 10 < posts_of_ten then
      return bodies[count % #bodies + 1]
   end
   return read
end

function init(args)
   posts_of_ten = tonumber(args[1])
   if posts_of_ten == 0 then
      return -- with no global `request`, wrk sends the same bytes again and costs nothing here
   end
   for line in io.lines(args[2]) do
      bodies[#bodies + 1] = wrk.format(
         "POST", "/postchatt", { ["Content-Type"] = "application/json" }, line
      )
   end
   read = wrk.format()
   request = mixed
end

function done(summary, latency, requests)
   local errors = summary.errors
   io.write(string.format(
      '\n{"requests":%d,"duration":%d,"bytes":%d,"p50":%d,"p99":%d,"max":%d,' ..
      '"errors":{"connect":%d,"read":%d,"write":%d,"timeout":%d,"status":%d}}\n',
      summary.requests, summary.duration, summary.bytes,
      latency:percentile(50), latency:percentile(99), latency.max,
      errors.connect, errors.read, errors.write, errors.timeout, errors.status
   ))
end
